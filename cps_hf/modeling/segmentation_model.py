"""The common initialisation and output of DeepLabV3+, HRNet and ViT-DPT. Copied with a pushed model."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import SemanticSegmenterOutput


class SegmentationModel(PreTrainedModel):
    """Initialisation: convolutions kaiming normal (fan-in, relu), norms 1 and 0, biases torch's default."""

    base_model_prefix = "backbone"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _no_split_modules: list[str] = []

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
            if module.bias is not None:
                bound = 1 / math.sqrt(module.weight[0].numel())
                init.uniform_(module.bias, -bound, bound)
        else:
            super()._init_weights(module)

    def output(
        self, logits: Tensor, labels: Tensor | None, hidden_states: tuple | None, return_dict: bool | None
    ) -> SemanticSegmenterOutput | tuple:
        """The output of `forward`: the logits, and with labels the mean cross entropy at label size."""
        loss = None
        if labels is not None:
            upsampled = F.interpolate(
                logits.float(), size=labels.shape[-2:], mode="bilinear", align_corners=self.config.align_corners
            )
            loss = F.cross_entropy(upsampled, labels, ignore_index=self.config.semantic_loss_ignore_index)
        if return_dict is False:
            return (logits,) if loss is None else (loss, logits)
        return SemanticSegmenterOutput(loss=loss, logits=logits, hidden_states=hidden_states)
