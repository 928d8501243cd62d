"""`CPSTrainer`: the loop. Algorithms live in `cps_hf.objectives`; this file never knows which one it runs."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, GradientAccumulationPlugin, InitProcessGroupKwargs, set_seed
from torch import Tensor, nn
from transformers.trainer_callback import (
    CallbackHandler,
    DefaultFlowCallback,
    TrainerCallback,
    TrainerControl,
)

from ..checkpointing import resume as resuming
from ..checkpointing import signals
from ..commands import parser as cli
from ..config import CPSConfig
from ..data.streams import TrainStream
from ..files import write_atomically
from ..hub import background as pushing
from ..objectives import CrossPseudoSupervision, Objective, ObjectiveOutput
from . import batches, failures, memory, results
from . import setup as assembly
from .batches import MicroBatch
from .callbacks import pictures
from .determinism import deterministic_algorithms
from .ema import update_teacher
from .evaluation import Judge
from .health import CollapseWatch, Guard
from .module import TrainingModule
from .reporting import Averages, RunLog, Stopwatch
from .sharding import prepare, refuse_engines

logger = logging.getLogger(__name__)


class CPSTrainer:
    """Trains branches on labeled and unlabeled images and hands out each by itself.

    Args:
        models: a pair (or more) of transformers models; or one Hub id, folder or configuration, used for each branch
            with initialisations of its own; or a sequence of those: different architectures may train each other.
        args: the settings.
        objective: the method, an object of `cps_hf.objectives`.
        train_dataset: the labeled set: columns "image", "label" and, if there is one, "id".
        unlabeled_dataset: "image" and, if there is one, "id"; a label column is never opened.
        eval_dataset: like `train_dataset`.
        processing_class: the image processor that exported branches carry; none: one that normalises with
            `args.image_mean` and `args.image_std` and does not resize.
        optimizers: (optimizer, learning-rate schedule) in place of those that `args` describe. The optimizer is over
            the parameters of `models`, which are then models and not ids.
        callbacks: transformers' `TrainerCallback`s.

    Raises:
        ValueError: the models, data sets, objective and settings do not fit together; it says which and how.
    """

    def __init__(
        self,
        models,
        args: CPSConfig | None = None,
        *,
        objective: Objective | None = None,
        train_dataset,
        unlabeled_dataset=None,
        eval_dataset=None,
        processing_class=None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
        callbacks: Sequence[TrainerCallback] | None = None,
    ):
        self.args = args = CPSConfig() if args is None else args
        self.objective = CrossPseudoSupervision() if objective is None else objective
        self.train_dataset, self.unlabeled_dataset, self.eval_dataset = train_dataset, unlabeled_dataset, eval_dataset
        self.processing_class = processing_class
        refuse_engines()
        assembly.check_trackers(args)
        self.accelerator = _accelerator(args)
        assembly.check_launch(self.accelerator, args)
        self.id2label = assembly.check_data(train_dataset, unlabeled_dataset, eval_dataset, self.objective)

        # Swappable training components
        self.models = assembly.build_models(models, args, self.objective, self.id2label, self.accelerator)
        self.id2label = self.models[0].config.id2label
        set_seed(args.seed, device_specific=True)  # dropout differs between processes, weights were drawn before
        self.module = TrainingModule(self.models, self.objective)
        if args.torch_compile:
            self.module.compile_networks(args.torch_compile_backend, args.torch_compile_mode)
        self.optimizer = optimizers[0] or assembly.make_optimizer(self.models, args)
        self.lr_scheduler = optimizers[1] or assembly.make_schedule(self.optimizer, args)
        # The schedule is not prepared: Accelerate would step it once a process.
        self.prepared, self.optimizer = prepare(self.accelerator, self.module, self.optimizer)
        self.device = self.accelerator.device
        self.image_mean, self.image_std = (
            torch.tensor(v, device=self.device) for v in (args.image_mean, args.image_std)
        )
        self._progress = torch.zeros((), device=self.device)
        self.judge = Judge(self.module, args, self.accelerator, num_labels=len(self.id2label))
        self.callback_handler = CallbackHandler(
            [DefaultFlowCallback, *(callbacks or [])], self.module, processing_class, self.optimizer, self.lr_scheduler
        )

        # Additional training states
        self.control = TrainerControl()
        self.state = assembly.trainer_state(args, self.accelerator)
        self.averages = Averages()
        self.guard = Guard(self.accelerator, self.module, args)
        self.collapse = CollapseWatch(args.max_steps)
        self.signals = signals.StopSignals()
        self.stopwatch = Stopwatch()
        self.scores: dict[str, dict[str, Any]] = {}  # the newest evaluation's, by row
        self.best: dict[str, Any] = {}  # the best evaluation's rows, and its "step" and "branch"
        self.agreement: dict[str, float] = {}  # "start" and "end"
        self.first_step = 0  # or the step that was resumed from
        self.fingerprint: dict[str, Any] = {}  # what decides how the run goes on
        self.streams: dict[str, TrainStream] = {}  # "labeled" and, where the objective asks for views, "unlabeled"
        self.run_log: RunLog | None = None
        self.pushes: pushing.BackgroundPushes | None = None  # of the main process, with `push_to_hub`
        self.control = self.callback_handler.on_init_end(args, self.state, self.control)

    # ------------------------------------------------------------------------------------------------ training

    def train(self, resume_from_checkpoint: str | bool | None = None) -> dict[str, Any]:
        """Train to `args.max_steps` and export the branches.

        Args:
            resume_from_checkpoint: a checkpoint's folder, true for the newest whole one, "auto" for that or a new
                run; none: what `args` say.

        Returns:
            What is written to `results.json`.

        Raises:
            ValueError: the output folder or the checkpoint cannot be used, or a sample cannot be read.
            FloatingPointError: a loss or gradient is not finite; the last checkpoint is whole.
            torch.OutOfMemoryError: a batch does not fit; it says what to change.
            ConnectionError: another process ended or does not answer.
            Preempted: a signal stopped the run, which is saved; uncaught, the program ends with code 85.
        """
        args, accelerator = self.args, self.accelerator
        wanted = args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        # All that can be wrong is found before anything is written.
        checkpoint, resumed = resuming.find_checkpoint(self, wanted)
        if args.auto_find_batch_size:
            memory.fit_batch(self)
        sets, starts = (self.train_dataset, self.unlabeled_dataset), resumed["streams"]
        labeled, unlabeled = assembly.train_streams(
            args, accelerator, self.objective, *sets, starts, num_labels=len(self.id2label)
        )
        if self.eval_dataset is not None:
            self.judge.check_first_batch(self.eval_dataset)
        if accelerator.is_main_process:
            self.pushes = pushing.BackgroundPushes(args) if args.push_to_hub else None
            resuming.prepare_output_dir(self, checkpoint, resumed)
            write_atomically(Path(args.output_dir) / "config.yaml", cli.to_yaml(args, self.objective))
        accelerator.wait_for_everyone()
        if checkpoint:
            resuming.load_checkpoint(self, checkpoint, resumed)
        assembly.init_trackers(accelerator, args, self.objective, self.state.global_step)
        self.run_log = RunLog(
            accelerator,
            args.output_dir,
            max_steps=args.max_steps,
            first_step=self.state.global_step,
            show_bar=not args.disable_tqdm,
        )
        self.state.log_history = self.run_log.read()
        try:
            with deterministic_algorithms(args.full_determinism), self.signals, failures.explained(self):
                self._loop(labeled, unlabeled)
            pictures.after_training(self)
        finally:
            self.run_log.bar.close()
            # Not accelerator.end_training(), which would end the processes' group before the branches are exported.
            for tracker in accelerator.trackers:
                tracker.finish()
        summary = results.finish(self)
        pushing.push_last(self)
        self.run_log = None  # what is logged from now on belongs to no run
        return summary

    def _loop(self, labeled: TrainStream, unlabeled: TrainStream | None) -> None:
        """The phases of an optimizer step, until the callbacks say that it is enough."""
        args, accelerator, state = self.args, self.accelerator, self.state
        self.streams = {"labeled": labeled} | ({"unlabeled": unlabeled} if unlabeled else {})
        labeled_batches = iter(labeled)
        unlabeled_batches = iter(unlabeled) if unlabeled else None
        self.control = self.callback_handler.on_train_begin(args, state, self.control)
        if state.global_step == 0:
            self._measure_agreement("start")
        self.prepared.train()
        self.control.should_training_stop |= state.global_step >= args.max_steps
        if self.control.should_training_stop and self.eval_dataset is not None and not self.scores:
            self._evaluate_and_keep_best()  # resumed at the end, with another evaluation set
        while not self.control.should_training_stop:
            self.stopwatch.start()
            self.control = self.callback_handler.on_step_begin(args, state, self.control)
            # fetch: the micro-batches of the whole step, since the losses divide by its global counts
            micro_batches = [
                self._fetch(labeled_batches, unlabeled_batches) for _ in range(args.gradient_accumulation_steps)
            ]
            batches.share_counts(micro_batches, accelerator)
            self._progress.fill_(state.global_step / args.max_steps)
            self.guard.before_step()
            # forward, backward
            outputs = [self._forward_backward(batch) for batch in micro_batches]
            # stop if not finite, clip
            verdict = self.guard.judge(self.optimizer, self.averages, told_to_stop=bool(self.signals.received))
            if verdict.finite:
                # step
                self.optimizer.step()
            else:
                self.guard.refuse(state.global_step + 1, verdict, micro_batches, outputs)
            self.lr_scheduler.step()
            self.optimizer.zero_grad()
            state.global_step += 1
            # teacher
            if verdict.finite and self.module.teacher is not None:
                decay = self.objective.ema_decay(state.global_step)
                update_teacher(self.module.teacher, self.module.branches[0], decay)
            self.stopwatch.stop(sum(s.shard.global_batch_size for s in self.streams.values()))
            self.run_log.bar.update()
            # log, evaluate, save
            self.control = self.callback_handler.on_step_end(args, state, self.control)
            self.control.should_save |= verdict.stop
            self._log_evaluate_save()
            if verdict.stop and not self.control.should_training_stop:
                signals.leave(self)
        self.control = self.callback_handler.on_train_end(args, state, self.control)

    def _forward_backward(self, batch: MicroBatch) -> ObjectiveOutput:
        """One micro-batch; gradients add up. (Accelerate divides by the accumulation steps.)"""
        with self.accelerator.accumulate(self.prepared):
            output = self.prepared(batch.labeled, batch.unlabeled, self._progress)
            self.accelerator.backward(output.loss)
        output = output._replace(loss=output.loss.detach())
        self.averages.add({"loss": output.loss, **output.logs}, 1 / self.args.gradient_accumulation_steps)
        return output

    def _fetch(self, labeled: Iterator[dict], unlabeled: Iterator[dict] | None) -> MicroBatch:
        """The next micro-batch on the device, images normalised. Samples that were replaced are written down."""
        fetched = [next(stream) for stream in (labeled, unlabeled) if stream is not None]
        bad_samples = [bad for batch in fetched for bad in batch["bad_samples"]]
        if bad_samples:
            self.run_log.write_bad_samples(bad_samples, self.state.global_step + 1)
        on_device = [batches.to_device(batch, self.device, self.image_mean, self.image_std) for batch in fetched]
        ids = {kind: batch["ids"] for kind, batch in zip(("labeled", "unlabeled"), fetched, strict=False)}
        return MicroBatch(on_device[0], on_device[1] if unlabeled is not None else None, ids)

    def _log_evaluate_save(self) -> None:
        args, state = self.args, self.state
        if self.control.should_log or (self.control.should_training_stop and self.averages.steps):
            means = self.averages.read()
            self.collapse.take(means, state.global_step)
            means |= {"skipped_steps": self.guard.skipped_steps} if args.max_skipped_steps else {}
            means["learning_rate"] = assembly.current_learning_rate(self.optimizer)
            self.log({**means, "images_per_second": self.stopwatch.read()})
        if self.control.should_evaluate or self.control.should_training_stop:
            self._evaluate_and_keep_best()
        if self.control.should_save or self.control.should_training_stop:  # an evaluation may have stopped the run
            resuming.save_checkpoint(self)
            self.control = self.callback_handler.on_save(args, state, self.control)
            pushing.push_saved(self)

    def _evaluate_and_keep_best(self) -> None:
        self.evaluate()
        self._keep_best()
        pictures.after_evaluation(self)

    def next_ids(self, count: int = 20) -> dict[str, list[str]]:
        """The ids of the next samples of each stream, in the global order over all processes, once training began."""
        return {name: stream.ids(resuming.position(self, name), count) for name, stream in self.streams.items()}

    def log(self, logs: dict[str, float]) -> None:
        """Give named numbers to metrics.jsonl, the trackers, the progress bar and the callbacks."""
        self.state.log_history.append({**logs, "step": self.state.global_step})
        if self.run_log is not None:
            self.run_log.write(logs, self.state.global_step)
            if "loss" in logs:
                self.run_log.show(logs)
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)

    # ------------------------------------------------------------------------------------------------ evaluation

    def evaluate(self, eval_dataset=None, *, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Score every branch, the teacher if there is one, and the branches' mean, on whole images.

        Returns:
            `<prefix>_mean_iou` (of the best single branch: what can be handed out), `<prefix>_<row>_mean_iou`,
            `_mean_accuracy` and `_overall_accuracy` for each row, and `<prefix>_agreement`. Fractions. The per-class
            scores are in `self.scores`; of another set than the run's they are `self.judge.scores(eval_dataset)`, and
            no part of the run's results. Empty without an evaluation set.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        metrics: dict[str, float] = {}
        self.module.share_buffers(self.accelerator)
        if dataset is not None:
            by_row = self.judge.scores(dataset)
            metric = self.args.metric_for_best_model
            metrics = {f"{metric_key_prefix}_{metric}": by_row[self._best_row(by_row)][metric]}
            for row, scores in by_row.items():
                for key in ("mean_iou", "mean_accuracy", "overall_accuracy"):
                    metrics[f"{metric_key_prefix}_{row}_{key}"] = scores[key]
            self.scores = by_row if eval_dataset is None else self.scores
        if eval_dataset is None:
            agreement = self._measure_agreement("end")
            metrics |= {} if agreement is None else {f"{metric_key_prefix}_agreement": agreement}
        if metrics:
            self.log(metrics)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def predict(self, dataset, *, branch: int | str = 0) -> Iterator[tuple[str, Tensor]]:
        """(id, uint8 (H, W) class ids) of each image of this process's share, at the image's own size.

        Args:
            dataset: needs "image"; a label is not looked at.
            branch: a number, "teacher", or "mean" (of the branches' probabilities).
        """
        return self.judge.predictions(dataset, [*self.module.branches] if branch == "mean" else [self.network(branch)])

    def network(self, branch: int | str) -> nn.Module:
        """A branch by number, or the teacher."""
        rows = {str(i): network for i, network in enumerate(self.module.branches)}
        if self.module.teacher is not None:
            rows["teacher"] = self.module.teacher
        if str(branch) not in rows:
            raise ValueError(f"`branch` must be one of {', '.join(rows)}, got {branch!r}.")
        return rows[str(branch)]

    def _measure_agreement(self, when: str) -> float | None:
        """The branches' agreement on the same few unlabeled images each time; kept under `when`."""
        if not (self.args.agreement_images and len(self.models) > 1 and self.unlabeled_dataset is not None):
            return None
        images = assembly.evenly_spaced(self.unlabeled_dataset, self.args.agreement_images)
        self.agreement[when] = self.judge.agreement(images)
        if when == "start":
            self.log({"eval_agreement": self.agreement[when]})
        return self.agreement[when]

    # ------------------------------------------------------------------------------------------------ saving

    def _best_row(self, scores: dict[str, dict[str, Any]]) -> str:
        """Which single network is best."""
        metric = self.args.metric_for_best_model
        return max((row for row in scores if row != "mean"), key=lambda row: scores[row][metric])

    def _keep_best(self) -> None:
        """`OUT/best`: a copy of the better branch at its best step."""
        if not self.scores:
            return
        row, metric = self._best_row(self.scores), self.args.metric_for_best_model
        value = self.scores[row][metric]
        if self.state.best_metric is None or value > self.state.best_metric:
            self.state.best_metric, self.state.best_global_step = value, self.state.global_step
            self.best = {**self.scores, "step": self.state.global_step, "branch": row}
            self.save_model(Path(self.args.output_dir) / "best", branch=row.removeprefix("branch_"))

    def save_model(self, output_dir: str | os.PathLike | None = None, *, branch: int | str = 0) -> None:
        """Export one branch: weights, config, image processor and card, and nothing of the other branch.

        Args:
            output_dir: none: `branch_<branch>` (or `teacher`) in `args.output_dir`.
        """
        name = "teacher" if branch == "teacher" else f"branch_{branch}"
        directory = Path(output_dir or Path(self.args.output_dir) / name)
        self.module.share_buffers(self.accelerator)
        results.export_branch(self, name, directory)
        self.accelerator.wait_for_everyone()

    def push_to_hub(
        self, commit_message: str = "End of training", *, branch: int | str | None = None, tag: str | None = None
    ) -> str | None:
        """Push a branch now and wait for it: the best one, or `branch` (a number, "teacher") as it is.

        Returns the commit's address (none in other processes than the main one); raises as `push.push_branch`.
        """
        if branch is not None:
            self.save_model(branch=branch)
        return pushing.push_now(self, commit_message, branch, tag) if self.accelerator.is_main_process else None


def _accelerator(args: CPSConfig) -> Accelerator:
    return Accelerator(
        # The streams have no end at which accumulation should sync.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=args.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        mixed_precision=args.mixed_precision,
        log_with=args.report_to or None,
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(seconds=args.ddp_timeout)),
            # A compiled block that is run again in backward finds no bf16 weights of earlier passes, and must
            # cast as many as the first time.
            AutocastKwargs(cache_enabled=not (args.torch_compile and args.gradient_checkpointing)),
        ],
        project_dir=args.output_dir,
    )
