"""The methods, one per file: each turns a labeled and an unlabeled batch into a loss, using only tensors and networks.

`OBJECTIVES` maps the names for the command line's `--objective NAME` to classes; in Python, pass an object instead.
"""

from .base import Branch, Objective, ObjectiveOutput, ramp, warmed_up
from .batch import Batch, LabeledBatch, UnlabeledBatch
from .cpc import CrossProbabilityConsistency
from .cps import CrossPseudoSupervision
from .cps_averaged import AveragedCPS
from .fixed_teacher import FixedTeacher
from .fixmatch import FixMatch
from .mean_teacher import MeanTeacher
from .pseudoseg import PseudoSeg
from .supervised import Supervised
from .unimatch import UniMatch
from .unimatch_v2 import UniMatchV2

OBJECTIVES: dict[str, type[Objective]] = {
    "supervised": Supervised,
    "cps": CrossPseudoSupervision,
    "cps_averaged": AveragedCPS,
    "cpc": CrossProbabilityConsistency,
    "mean_teacher": MeanTeacher,
    "pseudoseg": PseudoSeg,
    "fixmatch": FixMatch,
    "unimatch": UniMatch,
    "unimatch_v2": UniMatchV2,
    "fixed_teacher": FixedTeacher,
}

__all__ = [
    "OBJECTIVES",
    "AveragedCPS",
    "Batch",
    "Branch",
    "CrossProbabilityConsistency",
    "CrossPseudoSupervision",
    "FixMatch",
    "FixedTeacher",
    "LabeledBatch",
    "MeanTeacher",
    "Objective",
    "ObjectiveOutput",
    "PseudoSeg",
    "Supervised",
    "UniMatch",
    "UniMatchV2",
    "UnlabeledBatch",
    "ramp",
    "warmed_up",
]
