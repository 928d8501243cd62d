"""Which of transformers' own callbacks cannot work here: said before the first step, with what does the same.

Most do: they read the settings' `to_dict` or `to_json_string`, the state and the logs (a test runs each of them).
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import TrainerCallback

_REFUSED = {
    "TrackioCallback": 'reads settings that only transformers\' TrainingArguments have. Use `report_to=["trackio"]`',
    "JITCheckpointCallback": "saves by transformers' Trainer. A run that is told to stop by a signal saves by itself",
}
_UPLOADS = {  # callback -> how it was told to upload the model, which it does by a transformers' Trainer of its own
    "WandbCallback": ("the environment variable WANDB_LOG_MODEL", "wandb", ("end", "checkpoint")),
    "DVCLiveCallback": ("`log_model` or HF_DVCLIVE_LOG_MODEL", "dvclive", (True,)),
}


def check_callbacks(callbacks: Sequence[TrainerCallback]) -> None:
    """Refuse those of transformers that would fail, or do nothing.

    Raises:
        ValueError: there is one; it says what to do.
    """
    for callback in callbacks:
        names = {cls.__name__ for cls in type(callback).__mro__ if cls.__module__.startswith("transformers.")}
        for name in names & _REFUSED.keys():
            raise ValueError(f"{name} {_REFUSED[name]}: leave the callback out.")
        for name in names & _UPLOADS.keys():
            how, tracker, values = _UPLOADS[name]
            if getattr(callback, "_log_model", None) in values:
                raise ValueError(
                    f"{name} would upload the model by transformers' Trainer, as {how} asks. Switch that off "
                    "(branches are in `output_dir`, and `push_to_hub` pushes them), or log by "
                    f'`report_to=["{tracker}"]` and leave the callback out.'
                )
