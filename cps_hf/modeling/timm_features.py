"""A timm network as a backbone that keeps timm's own initialisation. Copied with a pushed model.

transformers' TimmBackbone resets batch-norm statistics when it is built, and leaves weights that a checkpoint lacks
as uninitialised memory. Here both stay as timm drew them, and a checkpoint that lacks weights is an error.
"""

from __future__ import annotations

from torch import nn
from transformers import TimmBackbone, TimmBackboneConfig


class TimmFeatures(TimmBackbone):
    """TimmBackbone with weights marked as initialised once timm has drawn them."""

    config_class = TimmBackboneConfig

    def post_init(self):
        """Mark what timm drew. (While a checkpoint is loaded, everything is on the meta device and nothing was
        drawn.)"""
        for tensor in (*self._backbone.parameters(), *self._backbone.buffers()):
            if not tensor.is_meta:
                tensor._is_hf_initialized = True
        super().post_init()

    def _init_weights(self, module: nn.Module):
        """Called for modules that are missing in a checkpoint."""
        lacking = [
            name
            for name, parameter in module.named_parameters(recurse=False)
            if not parameter.is_meta and not getattr(parameter, "_is_hf_initialized", False)
        ]
        if lacking:
            prefix = next(name for name, candidate in self._backbone.named_modules() if candidate is module)
            raise ValueError(
                f"The checkpoint lacks weights of the timm backbone {self.config.backbone!r}: "
                f"{', '.join(f'{prefix}.{name}' for name in lacking)}, ... To start from a backbone's weights, build "
                "the model from its configuration and load them into it."
            )
        super()._init_weights(module)
