"""Marks what a run can do without."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)


def optional(what: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a method that may fail: the run then warns and continues with `None`. A picture is not worth a run.

    Args:
        what: its result, for the warning.
    """

    def decorate(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def attempt(*args, **kwargs):
            try:
                return method(*args, **kwargs)
            except Exception as error:
                logger.warning("Without %s: %s: %s", what, type(error).__name__, error, exc_info=_is_ours(error))
                return None

        return attempt

    return decorate


def _is_ours(error: Exception) -> bool:
    """A full disk or a broken image needs no traceback. Anything else may be a bug of this package, and does."""
    return not isinstance(error, OSError | ValueError)
