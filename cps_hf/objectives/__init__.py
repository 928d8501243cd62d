"""The methods. `OBJECTIVES` is what a command line's `--objective NAME` can say; a program passes the object."""

from .base import Objective, ObjectiveOutput, Views
from .cps import CrossPseudoSupervision
from .supervised import Supervised

OBJECTIVES: dict[str, type[Objective]] = {
    "supervised": Supervised,
    "cps": CrossPseudoSupervision,
}

__all__ = ["OBJECTIVES", "CrossPseudoSupervision", "Objective", "ObjectiveOutput", "Supervised", "Views"]
