"""What a plan needs to know of the machine, and which pretrained backbone can be had on it."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import LocalEntryNotFoundError

from ..modeling import offline_backbone

logger = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
SMALL = "timm/tf_efficientnet_lite0.in1k"
"""The Hub's name of the weights that the package holds."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where training takes place.

    Args:
        device: "cpu" or "cuda".
        name: of the GPU; empty on a CPU.
        cores: CPU cores that this process may use.
        memory: of the GPU, in GiB; 0 on a CPU.
        bf16: whether the GPU computes in bfloat16.
        num_processes: how many train together.
        backbone: the best pretrained backbone that can be had here, as `ModelConfig.backbone` names it; None: none.
    """

    device: str = "cpu"
    name: str = ""
    cores: int = 1
    memory: float = 0.0
    bf16: bool = False
    num_processes: int = 1
    backbone: str | None = None

    @property
    def is_gpu(self) -> bool:
        return self.device != "cpu"

    @classmethod
    def here(cls, *, num_processes: int = 1, looks_for_backbone: bool = True) -> Machine:
        """This machine.

        Args:
            looks_for_backbone: whether a backbone is looked for, which downloads its weights from the Hub where no
                package holds them.
        """
        facts = {"cores": _cores(), "num_processes": num_processes}
        if torch.cuda.is_available():
            properties = torch.cuda.get_device_properties(0)
            facts |= {"device": "cuda", "name": properties.name, "memory": properties.total_memory / 2**30}
            facts |= {"bf16": torch.cuda.is_bf16_supported(including_emulation=False)}
        machine = cls(**facts)
        return cls(**facts, backbone=first_available(candidates(machine)) if looks_for_backbone else None)


def candidates(machine: Machine) -> list[str]:
    """Backbones for this machine, best first."""
    small = [offline_backbone.SOURCE, SMALL]
    if machine.memory >= 24:
        return ["timm/resnet101s.gluon_in1k", "timm/resnet50s.gluon_in1k", *small]
    return ["timm/resnet50s.gluon_in1k", *small] if machine.memory >= 6 else small


def first_available(names: Sequence[str]) -> str | None:
    """The first of these backbones whose weights are here or can be fetched; None: none of them.

    After one that the Hub did not give, no other is asked for.
    """
    hub_answers = True
    for name in names:
        if offline_backbone.is_packaged(name):
            if offline_backbone.is_installed():
                return name
        elif hub_answers:
            try:
                _fetch(name)
                return name
            except Exception as error:  # the client and what is beneath it raise a dozen kinds
                logger.info("%s cannot be fetched from the Hub: %s.", name, str(error).strip().split("\n")[0])
                hub_answers = False
    return None


def _fetch(name: str) -> None:
    """From the cache or the Hub, which is asked once first: without a connection a download is tried for half a
    minute."""
    try:
        hf_hub_download(name, WEIGHTS, local_files_only=True)
    except LocalEntryNotFoundError:
        get_hf_file_metadata(hf_hub_url(name, WEIGHTS), timeout=10)
        hf_hub_download(name, WEIGHTS)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
