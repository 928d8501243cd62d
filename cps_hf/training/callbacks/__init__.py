"""Optional reactions to a run: pictures, the report, pushes to the Hub, the collapse warning, early stopping, model
cards."""

from .card import ModelCardCallback
from .collapse import CollapseCallback
from .early_stopping import EarlyStopping
from .handler import Callbacks
from .pictures import Pictures, PicturesCallback
from .push import PushCallback
from .report import ReportCallback

__all__ = [
    "Callbacks",
    "CollapseCallback",
    "EarlyStopping",
    "ModelCardCallback",
    "Pictures",
    "PicturesCallback",
    "PushCallback",
    "ReportCallback",
]
