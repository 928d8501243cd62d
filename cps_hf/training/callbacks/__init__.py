"""What reacts to a run and could be left out: pictures, pushes to the Hub, the warning of collapse, model cards."""

from .card import ModelCardCallback
from .collapse import CollapseCallback
from .handler import Callbacks
from .pictures import Pictures, PicturesCallback
from .push import PushCallback

__all__ = ["Callbacks", "CollapseCallback", "ModelCardCallback", "Pictures", "PicturesCallback", "PushCallback"]
