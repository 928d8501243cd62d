"""The methods. `OBJECTIVES` is what a command line's `--objective NAME` can say; a program passes the object."""

from .base import Objective, ObjectiveOutput, Views
from .cpc import CrossProbabilityConsistency
from .cps import CrossPseudoSupervision
from .fixmatch import FixMatch
from .mean_teacher import MeanTeacher
from .pseudoseg import PseudoSeg
from .supervised import Supervised
from .unimatch import UniMatch

OBJECTIVES: dict[str, type[Objective]] = {
    "supervised": Supervised,
    "cps": CrossPseudoSupervision,
    "cpc": CrossProbabilityConsistency,
    "mean_teacher": MeanTeacher,
    "pseudoseg": PseudoSeg,
    "fixmatch": FixMatch,
    "unimatch": UniMatch,
}

__all__ = [
    "OBJECTIVES",
    "CrossProbabilityConsistency",
    "CrossPseudoSupervision",
    "FixMatch",
    "MeanTeacher",
    "Objective",
    "ObjectiveOutput",
    "PseudoSeg",
    "Supervised",
    "UniMatch",
    "Views",
]
