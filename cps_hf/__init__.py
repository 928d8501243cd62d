"""Cross Pseudo Supervision (CPS, CVPR 2021) for Hugging Face segmentation models.

Two models, few masks, many images: each model is trained on the other's predictions for the unlabeled images, and one
of them is handed out. `CPSTrainer` is the loop, `cps_hf.objectives` the methods, `cps_hf.data` the data sets.
"""

from .config import CPSConfig
from .objectives import OBJECTIVES, CrossPseudoSupervision, Objective, ObjectiveOutput, Supervised
from .training.trainer import CPSTrainer

__version__ = "0.1.0"

__all__ = [
    "OBJECTIVES",
    "CPSConfig",
    "CPSTrainer",
    "CrossPseudoSupervision",
    "Objective",
    "ObjectiveOutput",
    "Supervised",
    "__version__",
]
