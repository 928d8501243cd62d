"""Rejects the few transformers callbacks that cannot work here, before the first step, and names an alternative.

Most callbacks work: they read the settings' `to_dict` or `to_json_string`, the state and the logs (tested for each).
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import TrainerCallback

_UNSUPPORTED = {
    "TrackioCallback": 'reads settings that only transformers\' TrainingArguments has. Use `report_to=["trackio"]`',
    "JITCheckpointCallback": "saves with transformers' Trainer. A run here saves by itself when it receives a signal",
}
_UPLOADS = {  # callback -> the setting that makes it upload the model, with a transformers Trainer that it creates
    "WandbCallback": ("the environment variable WANDB_LOG_MODEL", "wandb", ("end", "checkpoint")),
    "DVCLiveCallback": ("`log_model` or HF_DVCLIVE_LOG_MODEL", "dvclive", (True,)),
}


def check_callbacks(callbacks: Sequence[TrainerCallback]) -> None:
    """Reject transformers callbacks that would fail or do nothing.

    Raises:
        ValueError: there is one. The message says what to do.
    """
    for callback in callbacks:
        names = {cls.__name__ for cls in type(callback).__mro__ if cls.__module__.startswith("transformers.")}
        for name in names & _UNSUPPORTED.keys():
            raise ValueError(f"{name} {_UNSUPPORTED[name]}: remove the callback.")
        for name in names & _UPLOADS.keys():
            how, tracker, values = _UPLOADS[name]
            if getattr(callback, "_log_model", None) in values:
                raise ValueError(
                    f"{name} would upload the model with transformers' Trainer, because {how} is set. Disable that "
                    "(branches are in `output_dir`, and `push_to_hub` pushes them), or log with "
                    f'`report_to=["{tracker}"]` and remove the callback.'
                )
