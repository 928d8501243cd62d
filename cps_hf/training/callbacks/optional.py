"""What a run can do without."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)


def optional(what: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A method that may fail: then the run warns and goes on with None, since no training is lost for a picture.

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
    """A failing disk or a broken image needs no traceback; anything else may be a fault of ours, and does."""
    return not isinstance(error, OSError | ValueError)
