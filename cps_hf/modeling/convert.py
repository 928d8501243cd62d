"""Converts checkpoints of the public CPS code (TorchSemiSeg) to transformers models."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .configuration_deeplabv3_plus import DeepLabV3PlusConfig
from .modeling_deeplabv3_plus import DeepLabV3PlusForSemanticSegmentation

# a prefix there -> the prefix here; the rest is the same
PREFIXES = {
    "backbone.": "backbone._backbone.",
    "head.aspp.map_convs.": "decode_head.pyramid.convs.",
    "head.aspp.map_bn.": "decode_head.pyramid.norm.0.",
    "head.aspp.red_conv.": "decode_head.pyramid.projection.",
    "head.aspp.global_pooling_conv.": "decode_head.pyramid.pooled_conv.",
    "head.aspp.global_pooling_bn.": "decode_head.pyramid.pooled_norm.0.",
    "head.aspp.pool_red_conv.": "decode_head.pyramid.pooled_projection.",
    "head.aspp.red_bn.": "decode_head.pyramid.output_norm.0.",
    "head.reduce.0.": "decode_head.low_level.0.",
    "head.reduce.1.": "decode_head.low_level.1.",
    "head.last_conv.0.": "decode_head.decoder.0.0.",
    "head.last_conv.1.": "decode_head.decoder.0.1.",
    "head.last_conv.3.": "decode_head.decoder.1.0.",
    "head.last_conv.4.": "decode_head.decoder.1.1.",
    "classifier.": "decode_head.classifier.",
}
DEPTHS = {6: "resnet50s", 23: "resnet101s"}  # blocks of stage 3 -> timm's name


def from_torchsemiseg(
    state_dict: Mapping[str, Tensor | Mapping],
    branch: int = 1,
    num_labels: int = 21,
    id2label: Mapping[int, str] | None = None,
) -> DeepLabV3PlusForSemanticSegmentation:
    """Convert one branch of a public CPS checkpoint to a DeepLabV3+ with the same logits, in evaluation mode.

    Args:
        state_dict: names to tensors, with or without the prefix "module.", or the file's whole content with the state
            under "model".
        branch: 1 (the one that the release evaluates) or 2.
        num_labels: the number of classes: 21 on VOC, 19 on Cityscapes.
        id2label: their names.

    Raises:
        ValueError: the branch or number of classes is wrong, or weights are missing, unknown, or of another shape.
    """
    if branch not in (1, 2):
        raise ValueError(f"`branch` must be 1 or 2, got {branch!r}.")
    if id2label is not None and len(id2label) != num_labels:
        raise ValueError(f"`id2label` names {len(id2label)} classes, `num_labels` is {num_labels}.")
    weights = _branch_weights(state_dict, branch)
    depth = len({key.split(".")[2] for key in weights if key.startswith("backbone.layer3.")})
    if depth not in DEPTHS:
        raise ValueError(f"Stage 3 of the backbone has {depth} blocks; a ResNet-50 has 6, a ResNet-101 has 23.")
    labels = {"num_labels": num_labels}
    if id2label is not None:
        names = {int(index): str(name) for index, name in id2label.items()}
        labels = {"id2label": names, "label2id": {name: index for index, name in names.items()}}
    model = DeepLabV3PlusForSemanticSegmentation(DeepLabV3PlusConfig(backbone=DEPTHS[depth], **labels))
    expected = model.state_dict()
    found = {_renamed(key, branch): tensor for key, tensor in weights.items()}
    for key, tensor in expected.items():
        if key.endswith("num_batches_tracked"):  # a batch counter that nothing uses; old torch did not save it
            found.setdefault(key, torch.zeros_like(tensor))
    missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or unknown:
        raise ValueError(
            f"The checkpoint is not the CPS release's DeepLabV3+ on {DEPTHS[depth]}: {len(missing)} weights are "
            f"missing ({', '.join(missing[:3])}), {len(unknown)} are unknown ({', '.join(unknown[:3])})."
        )
    for key, tensor in found.items():
        if tensor.shape != expected[key].shape:
            raise ValueError(
                f"{key} has the shape {tuple(tensor.shape)} in the checkpoint; expected {tuple(expected[key].shape)}"
                + (f" for num_labels={num_labels}." if "classifier" in key else ".")
            )
    model.load_state_dict(found)
    return model.eval()


def _branch_weights(state_dict: Mapping, branch: int) -> dict[str, Tensor]:
    """The branch's weights by their names inside it; "model" and "module." are removed, in any order."""
    if isinstance(state_dict.get("model"), Mapping):
        state_dict = state_dict["model"]
    weights = {}
    for key, tensor in state_dict.items():
        while key.startswith(("module.", "model.")):
            key = key.split(".", 1)[1]
        if key.startswith(f"branch{branch}."):
            weights[key.removeprefix(f"branch{branch}.")] = tensor
    if not weights:
        some = ", ".join(list(state_dict)[:3]) or "none"
        raise ValueError(f"The state dict has no weight of `branch{branch}`; it has {some}, ...")
    return weights


def _renamed(key: str, branch: int) -> str:
    for old, new in PREFIXES.items():
        if key.startswith(old):
            return new + key.removeprefix(old)
    return f"branch{branch}.{key}"
