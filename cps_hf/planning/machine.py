"""What a plan needs to know about the machine, and which pretrained backbone is available on it."""

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
"""The Hub name of the weights that the package contains."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The machine that trains.

    Args:
        device: "cpu" or "cuda".
        name: of the GPU; empty on a CPU.
        cores: CPU cores that this process may use.
        memory: of the GPU, in GiB; 0 on a CPU.
        bf16: whether the GPU computes in bfloat16.
        num_processes: number of processes that train together.
        backbone: the best pretrained backbone available here, as `ModelConfig.backbone` names it; None if there is
            none.
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
            looks_for_backbone: whether to look for a backbone. This downloads its weights from the Hub unless an
                installed package contains them.
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
    """The first of these backbones whose weights are here or can be downloaded; None if there is none.

    After one failed download from the Hub, no other is tried.
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
            except Exception as error:  # the client and its dependencies raise many kinds
                logger.info("%s could not be downloaded from the Hub: %s.", name, str(error).strip().split("\n")[0])
                hub_answers = False
    return None


def _fetch(name: str) -> None:
    """Load from the cache or the Hub. Checks the connection first: without one, a download is retried for half a
    minute."""
    try:
        hf_hub_download(name, WEIGHTS, local_files_only=True)
    except LocalEntryNotFoundError:
        get_hf_file_metadata(hf_hub_url(name, WEIGHTS), timeout=10)
        hf_hub_download(name, WEIGHTS)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
