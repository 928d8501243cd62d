"""Tiny mask-classification networks that, like trained ones, predict more than one class for an image."""

from __future__ import annotations

import torch

from cps_hf.modeling import build_branches
from support.architectures import UNIVERSAL

BY_TYPE = {row.model_type: row for row in UNIVERSAL}
NAMES = dict(enumerate(["road", "car", "tree", "sky", "person"]))


@torch.no_grad()
def speaking(kind, seed: int = 0):
    """A model in evaluation mode with different queries, for `NAMES`."""
    model = build_branches(kind.config(), num_branches=1, id2label=NAMES)[0].eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith(("queries_embedder.weight", "queries_features.weight")) or name == "query.weight":
            parameter.copy_(3 * torch.randn(parameter.shape, generator=generator))
        elif "decoder.layers" in name and ("q_proj" in name or "v_proj" in name or "o_proj" in name):
            parameter.mul_(20)  # MaskFormer's queries start at zero, but each should see something else
    output = model(pixel_values=torch.randn(1, 3, *kind.size, generator=generator))
    last = [p for name, p in model.named_parameters() if "mask_embedder" in name or "mask_head" in name][-2:]
    scale = 3 / output.masks_queries_logits.std()
    for parameter in last:  # weight and bias: the masks' logits are linear in them
        parameter.mul_(scale)
    said = output.class_queries_logits[0]
    deviation = said.std(0).clamp(min=1e-6)
    model.class_predictor.weight.mul_(2 / deviation[:, None])
    model.class_predictor.bias.sub_(said.mean(0)).mul_(2 / deviation)
    return model
