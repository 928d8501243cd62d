"""Choose settings for a user's own data from the images and the machine, each with its reason."""

from .facts import DataFacts
from .machine import Machine
from .plan import Choice, Plan, Timings, TooShortError, make_plan
from .recommended import FIRST_STAGE_SHARE, LABELED, RECOMMENDED, UNLABELED

__all__ = [
    "FIRST_STAGE_SHARE",
    "LABELED",
    "RECOMMENDED",
    "UNLABELED",
    "Choice",
    "DataFacts",
    "Machine",
    "Plan",
    "Timings",
    "TooShortError",
    "make_plan",
]
