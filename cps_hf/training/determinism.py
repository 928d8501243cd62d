"""Deterministic algorithms instead of faster ones."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

logger = logging.getLogger(__name__)


@contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """If `wanted`, torch raises an error for operations without a deterministic implementation on their device. The
    previous mode is restored at the end.

    docs/determinism.md explains what this achieves.
    """
    if not wanted:
        yield
        return
    if torch.cuda.is_available() and os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in (":4096:8", ":16:8"):
        logger.warning(
            "`full_determinism`: set the environment variable CUBLAS_WORKSPACE_CONFIG=:4096:8 before Python starts; "
            "without it, some matrix products on a GPU are errors in torch."
        )
    cudnn = torch.backends.cudnn
    before = (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
    cudnn_before = (cudnn.deterministic, cudnn.benchmark)
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        cudnn.deterministic, cudnn.benchmark = cudnn_before
