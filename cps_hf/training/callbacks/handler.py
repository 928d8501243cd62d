"""Calls a run's callbacks in order."""

from __future__ import annotations

from typing import Any

from transformers.trainer_callback import CallbackHandler

from ..late import Late


class Callbacks(CallbackHandler):
    """transformers' handler, except that after the last step a failing callback does not keep the others from running.

    Args:
        late: collects failures after the last step. Earlier errors are raised.
    """

    def __init__(self, late: Late, *arguments: Any):
        self.late = late
        super().__init__(*arguments)

    def call_event(self, event, args, state, control, **kwargs):
        for callback in self.callbacks:
            with self.late.attempt(f"{type(callback).__name__}.{event}"):
                result = getattr(callback, event)(
                    args,
                    state,
                    control,
                    model=self.model,
                    processing_class=self.processing_class,
                    optimizer=self.optimizer,
                    lr_scheduler=self.lr_scheduler,
                    train_dataloader=self.train_dataloader,
                    eval_dataloader=self.eval_dataloader,
                    **kwargs,
                )
                control = control if result is None else result
        return control
