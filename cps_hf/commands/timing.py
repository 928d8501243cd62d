"""Measure a step here: a short trial run with a plan's settings, which leaves no files behind."""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from accelerate.utils import gather_object
from datasets import Dataset
from transformers import TrainerCallback

from ..config import CPSConfig
from ..planning import Timings
from ..planning.plan import MOST_STEPS, RESERVE
from ..training.evaluation import Evaluator
from ..training.setup import evenly_spaced
from ..training.trainer import CPSTrainer

logger = logging.getLogger(__name__)

WARM_UP = 2
"""Steps of each stage that are not counted: the first ones find batches that were prefetched."""
SLOWER = 1.3
"""What follows the last step is given at least this many times its duration in the trial."""
RECENT = 20
"""Steps whose duration shows how fast the machine is at the moment."""
AGREEMENT_IMAGES = CPSConfig().agreement_images
PICTURES = 6.0
"""Approximate seconds of computing for pictures, figures, cards and the report at the end of a run."""


class StepTimes(TrainerCallback):
    """Seconds per step, including waiting for data; and when the first step began and the last ended."""

    def __init__(self):
        self.seconds: list[float] = []
        self.began = self.ended = 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        """Start the clock."""
        self._start = time.monotonic()
        self.began = self.began or self._start

    def on_step_end(self, args, state, control, **kwargs):
        """Stop the clock. The host has read the losses in this step, so a GPU is done with it."""
        self.ended = time.monotonic()
        self.seconds.append(self.ended - self._start)


class TimeLimit(StepTimes):
    """Keeps a run within its time.

    After the first stage, the second one gets as many steps as fit into the time that is left, at the speed of the
    machine until then. If the machine becomes slower still, or the length is given and does not fit, training ends
    early; the run is then saved and evaluated.

    Args:
        time: the value of `--time`, for messages.
        end: when the run must be done, by `time.monotonic`.
        reserve: seconds for what follows the last step, at the speed of the trial. It is multiplied by `SLOWER`, or by
            how much slower steps have become.
        timings: the trial by which the length was chosen. If `None`, the length is not fitted.
        given: whether `--max_steps` was given.
    """

    def __init__(self, time: str, end: float, reserve: float, timings: Timings | None = None, *, given: bool = False):
        super().__init__()
        self.time, self.end, self.reserve, self.timings, self.given = time, end, reserve, timings, given

    def on_step_end(self, args, state, control, **kwargs):
        """End training if the rest of the time is needed for what follows."""
        super().on_step_end(args, state, control, **kwargs)
        is_first = state.global_step <= (args.pretrain_steps or 0)
        recent = self.seconds[max(WARM_UP, len(self.seconds) - RECENT) :]
        a_step = statistics.median(recent) if recent else 0.0  # the next one
        last = self.end - self.reserve * self._at_least(self._slowdown(a_step, is_first))
        if time.monotonic() + a_step > last and state.global_step < state.max_steps:
            why = "`--max_steps` is more than fits" if self.given else "the machine has become slower"
            logger.warning(
                "`--time %s` is nearly over at step %d of %d, so training ends here: %s.",
                *(self.time, state.global_step, state.max_steps, why),
            )
            control.should_training_stop = True

    def on_save(self, args, state, control, **kwargs):
        """Fit the second stage to the time that is left. The first stage always ends with a checkpoint."""
        border, timings = args.pretrain_steps or 0, self.timings
        if not state.global_step == border > 0:
            return
        seconds, self.seconds = self.seconds[max(WARM_UP, len(self.seconds) // 2) :], []
        if timings is None or control.should_training_stop:
            return
        # The mean: some steps are longer, such as those that begin another pass through the images.
        slowdown = self._slowdown(statistics.mean(seconds) if seconds else 0.0, True)
        a_step = slowdown * timings.second_stage
        with_evaluations = a_step + slowdown * timings.evaluation / state.eval_steps
        left = self.end - self.reserve * self._at_least(slowdown) - time.monotonic()
        steps = min(border + max(1, int((1 - RESERVE) * left / with_evaluations)), MOST_STEPS)
        if steps != state.max_steps:
            logger.info(
                "The second stage gets %d steps instead of %d, as many as fit into `--time %s`. Each will take about "
                "%.2g s.",
                *(steps - border, state.max_steps - border, self.time, a_step),
            )
            state.max_steps = steps

    def _slowdown(self, a_step: float, is_first: bool) -> float:
        """How many times as long as in the trial a step takes; 1 if one of them is unknown."""
        if self.timings is None or not a_step:
            return 1.0
        return a_step / (self.timings.first_stage if is_first else self.timings.second_stage)

    def _at_least(self, slowdown: float) -> float:
        """By how much to multiply the reserve, which is a measurement or, without timings, already a safe guess."""
        return 1.0 if self.timings is None else max(SLOWER, slowdown)


def time_steps(make_trainer: Callable[..., CPSTrainer], two_stages: bool, *, timed: int = 5) -> Timings:
    """Run some steps of each stage, and evaluate a few images.

    Called by all processes, which get the same numbers: those of the slowest process.

    Args:
        make_trainer: makes the trainer of the run, given a callback and other values of some settings by name.
        two_stages: whether the method follows a supervised stage.
        timed: timed steps per stage.
    """
    start, steps, clock = time.monotonic(), WARM_UP + timed, StepTimes()
    started = time.process_time()
    with tempfile.TemporaryDirectory(prefix="cps_hf-timing-") as folder, _quiet():
        trainer = make_trainer(
            clock,
            output_dir=f"{folder}/run",
            resume_from_checkpoint=None,
            overwrite_output_dir=False,
            max_steps=2 * steps if two_stages else steps,
            pretrain_steps=steps if two_stages else None,
            eval_steps=None,
            early_stopping_patience=None,
            save_steps=None,
            warmup_steps=0,
            report_to=[],
            push_to_hub=False,
            agreement_images=0,
            num_pictures=0,
            disable_tqdm=True,
            check_labels_seconds=0.0,
        )
        evaluation, trainer.eval_dataset = trainer.eval_dataset, None
        trainer.train()
        trained = time.monotonic()
        starting, an_image = evaluation_times(trainer.evaluator, evaluation)
    count = len(evaluation) if isinstance(evaluation, Dataset) else 0
    agreement = starting + AGREEMENT_IMAGES * an_image if two_stages else 0.0  # before step 1 and at each evaluation
    stages = [clock.seconds[:steps], clock.seconds[steps:]] if two_stages else [clock.seconds, clock.seconds]
    first, second = (statistics.median(stage[WARM_UP:]) for stage in stages)  # not the mean: a step may be delayed
    # On a machine that is busy with other work, the pictures take longer too.
    busy = max(1.0, (time.monotonic() - start) / max(time.process_time() - started, 1e-3))
    timings = Timings(
        first_stage=first,
        second_stage=second,
        evaluation=agreement + (starting + count * an_image if count else 0.0),
        start=(clock.began - start) + agreement,
        end=(trained - clock.ended) + PICTURES * busy,
        spent=time.monotonic() - start,
    )
    names = vars(timings)
    everywhere = gather_object([names])
    return Timings(**{name: max(found[name] for found in everywhere) for name in names})


def evaluation_times(evaluator: Evaluator, evaluation) -> tuple[float, float]:
    """Seconds for starting an evaluation, such as its worker processes, and per image, for scoring all networks.
    Zeros without an evaluation set."""
    if evaluation is None:
        return 0.0, 0.0
    one, few = (evenly_spaced(evaluation, count) for count in (1, 4))
    count = len(few) if isinstance(few, Dataset) else 4
    evaluator.scores(one)  # warm-up: the first image finds cold caches
    seconds = []
    for images in (one, few):
        start = time.monotonic()
        evaluator.scores(images)
        seconds.append(time.monotonic() - start)
    each = max(0.0, seconds[1] - seconds[0]) / (count - 1) if count > 1 else seconds[0]
    return max(0.0, seconds[0] - each), each


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the messages of a trial, which the run repeats."""
    logger = logging.getLogger("cps_hf")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
