"""The training loop and what surrounds a step: streams, averages, evaluation, numerical health, callbacks."""

from .evaluation import Evaluator
from .late import AfterTrainingError, EvaluationError
from .state import RunState
from .trainer import CPSTrainer

__all__ = ["AfterTrainingError", "CPSTrainer", "EvaluationError", "Evaluator", "RunState"]
