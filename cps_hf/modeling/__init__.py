"""Segmentation models as branches: built, initialised, frozen, checked and grouped for the optimizer.

Importing this package registers DeepLabV3+, HRNet and ViT-DPT with transformers' Auto classes. Their files must stay
in the same folder as segmentation_model.py and timm_features.py, which they need: transformers copies a saved model's
code from one folder only.
"""

from transformers import AutoConfig, AutoModelForSemanticSegmentation

from .adapters import add_adapters
from .backbones import load_backbone_weights
from .branches import Branch, build_branches
from .configuration_deeplabv3_plus import DeepLabV3PlusConfig
from .configuration_hrnet import HRNetConfig
from .configuration_vit_dpt import ViTDPTConfig
from .convert import from_torchsemiseg
from .freezing import freeze, freeze_unused_parameters
from .gradient_checkpointing import enable_gradient_checkpointing
from .input_size import check_input_size, check_train_batch
from .modeling_deeplabv3_plus import DeepLabV3PlusForSemanticSegmentation
from .modeling_hrnet import HRNetForSemanticSegmentation
from .modeling_vit_dpt import ViTDPTForSemanticSegmentation
from .norms import convert_sync_batchnorm, set_norm_momentum
from .param_groups import parameter_groups

for _config, _model in (
    (DeepLabV3PlusConfig, DeepLabV3PlusForSemanticSegmentation),
    (HRNetConfig, HRNetForSemanticSegmentation),
    (ViTDPTConfig, ViTDPTForSemanticSegmentation),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModelForSemanticSegmentation.register(_config, _model, exist_ok=True)
    # a saved model takes its code along, so that it loads where this package is not installed
    _config.register_for_auto_class()
    _model.register_for_auto_class("AutoModelForSemanticSegmentation")

__all__ = [
    "Branch",
    "DeepLabV3PlusConfig",
    "DeepLabV3PlusForSemanticSegmentation",
    "HRNetConfig",
    "HRNetForSemanticSegmentation",
    "ViTDPTConfig",
    "ViTDPTForSemanticSegmentation",
    "add_adapters",
    "build_branches",
    "check_input_size",
    "check_train_batch",
    "convert_sync_batchnorm",
    "enable_gradient_checkpointing",
    "freeze",
    "freeze_unused_parameters",
    "from_torchsemiseg",
    "load_backbone_weights",
    "parameter_groups",
    "set_norm_momentum",
]
