"""`CPSTrainer`: the training loop. Methods live in `cps_hf.objectives`; this file does not depend on any of them."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, InitProcessGroupKwargs, set_seed
from torch import Tensor
from transformers.trainer_callback import DefaultFlowCallback, TrainerCallback, TrainerControl

from ..checkpointing import signals
from ..checkpointing.fingerprint import fingerprint, with_new_fields
from ..checkpointing.resume import Checkpointer, length_of, on_main_process
from ..config import AugmentationConfig, CPSConfig, EvaluationConfig, HubConfig, ModelConfig, Provenance, flat
from ..data.streams import TrainStream, decodable
from ..files import write_atomically
from ..hub.image_processors import check_processor
from ..hub.push import push_branch, repo_id_of
from ..modeling.branches import Branch
from ..modeling.classes import classes_of
from ..modeling.universal import anneal_masked_attention
from ..objectives import Objective, ObjectiveOutput, warmed_up
from . import (
    arguments,
    batches,
    comparison,
    failures,
    memory,
    model_checks,
    normalization,
    results,
    setup,
    unlabeled_weight,
)
from .batches import MicroBatch
from .best import BestBranch
from .callbacks import (
    Callbacks,
    CollapseCallback,
    EarlyStopping,
    ModelCardCallback,
    Pictures,
    PicturesCallback,
    PushCallback,
    ReportCallback,
)
from .callbacks.foreign import check_callbacks
from .determinism import deterministic_algorithms
from .ema import update_teacher
from .evaluation import Evaluator
from .export import BranchExporter
from .health import ONE_CLASS, Guard
from .inspection import absent_line, check_labels
from .labelers import check_sources, load_labelers
from .late import CHECKPOINT, EVALUATION, Late
from .module import TrainingModule
from .processes import together
from .reporting import RunLog, mean_iou_in_words, without_nan
from .sharding import prepare, reject_engines
from .stages import Stages
from .watch import Watch

logger = logging.getLogger(__name__)


class CPSTrainer:
    """Trains branches on labeled and unlabeled images, and exports each branch separately.

    Args:
        models: two or more transformers models; or one Hub id, folder or configuration, used for every branch with a
            different initialisation; or a sequence of those. Branches of different architectures can train each other.
            `model` is an alias.
        args: the settings of the loop.
        objective: the method: an object from `cps_hf.objectives`, or its name in `OBJECTIVES` for the defaults. If
            `None`, CPS.
        train_dataset: the labeled set, with the columns "image", "label" and, optionally, "id".
        unlabeled_dataset: has "image" and, optionally, "id"; a label column is never read.
        eval_dataset: like `train_dataset`.
        augmentation, model_config, evaluation, hub, provenance: the other groups of settings (`cps_hf.config`).
        processing_class: the image processor to export with branches. It also sets how images are normalised, unless
            `model_config` does. If `None`, one that does what training did, without resizing.
        optimizers: (optimizer, learning-rate schedule) to use instead of those in `args`. The optimizer must have the
            parameters of `models`, which must then be models and not ids.
        callbacks: transformers' `TrainerCallback`s. Pictures, the report, the collapse warning, model cards and pushes
            are callbacks too, added by default (`cps_hf.training.callbacks`). A callback derived from one of those
            replaces it, and `remove_callback` removes one.

    Attributes:
        state: what the run knows about itself, including its scores (`cps_hf.training.state.RunState`).

    Raises:
        TypeError: an argument has the wrong type, is missing or is unknown.
        ValueError: the models, data sets, objective and settings do not match. The message says which, and why.
    """

    def __init__(
        self,
        models=None,
        args: CPSConfig | None = None,
        *,
        model=None,
        objective: Objective | str | None = None,
        train_dataset,
        unlabeled_dataset=None,
        eval_dataset=None,
        augmentation: AugmentationConfig | None = None,
        model_config: ModelConfig | None = None,
        evaluation: EvaluationConfig | None = None,
        hub: HubConfig | None = None,
        provenance: Provenance | None = None,
        processing_class=None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
        callbacks: Sequence[TrainerCallback] | None = None,
        **unknown,
    ):
        arguments.reject_unknown(type(self), unknown)
        models = arguments.models_given(models, model)
        arguments.check_groups(
            {
                "args": (args, CPSConfig),
                "augmentation": (augmentation, AugmentationConfig),
                "model_config": (model_config, ModelConfig),
                "evaluation": (evaluation, EvaluationConfig),
                "hub": (hub, HubConfig),
                "provenance": (provenance, Provenance),
            }
        )
        self.args = args = args or CPSConfig()
        self.augmentation = augmentation or AugmentationConfig()
        self.model_config = model_config or ModelConfig()
        self.evaluation = evaluation or EvaluationConfig()
        self.hub, self.provenance = hub or HubConfig(), provenance or Provenance()
        self.objective = arguments.objective_given(objective)
        self.train_dataset, self.unlabeled_dataset, self.eval_dataset = train_dataset, unlabeled_dataset, eval_dataset
        self.processing_class = processing_class
        self.evaluation.check_stride(self.augmentation.crop_size)
        reject_engines()
        setup.check_trackers(args)
        setup.check_precision(args)
        self.accelerator = accelerator = _accelerator(args)
        setup.check_launch(accelerator, args, self.model_config)
        check_sources(self.objective.labelers)
        id2label = setup.check_data(args, train_dataset, unlabeled_dataset, eval_dataset, self.objective)
        unlabeled_weight.check(args, self.objective, eval_dataset)
        self.state = setup.run_state(args, accelerator)
        self.stages = Stages(args, self.objective, self.state)
        self._make_networks(models, id2label)
        self._make_optimizer(optimizers)
        self._make_monitors([*(callbacks or [])])

    def _make_networks(self, models, id2label: dict[int, str] | None) -> None:
        """The branches, their averages and the labelers."""
        args, accelerator, processing_class = self.args, self.accelerator, self.processing_class
        crop_size = self.augmentation.crop_size
        self.models = setup.build_models(
            models, self.model_config, args, crop_size, self.objective, id2label, accelerator
        )
        model_checks.check_shrink(self.evaluation, self.models)
        self.id2label = id2label or classes_of(self.models)
        self.objective.check_class_weights(len(self.id2label))
        self.model_config = normalization.settle(
            self.model_config, models, self.models, processing_class, say=accelerator.is_main_process
        )
        self.groups = (args, self.augmentation, self.model_config, self.evaluation, self.hub, self.provenance)
        means = (self.model_config.image_mean, self.model_config.image_std)
        if processing_class is not None:
            reduces = setup.reduces_labels(self.train_dataset)
            for model in self.models:
                check_processor(processing_class, model.config.model_type, *means, reduces=reduces)
        self._masked_attention = setup.annealed_masked_attention(self.models, self.objective)
        averages = setup.keeps_averages(args, self.objective)
        self.labelers = load_labelers(
            self.objective.labelers,
            id2label=self.id2label,
            image_mean=self.model_config.image_mean,
            image_std=self.model_config.image_std,
            crop_size=crop_size,
            device=accelerator.device,
            trust_remote_code=self.model_config.trust_remote_code,
        )
        self.module = TrainingModule(self.models, self.objective, averages=averages, labelers=self.labelers)
        if self.model_config.lora_rank is not None:
            setup.share_backbones(self.module, accelerator)
        if args.torch_compile:
            self.module.compile_networks(args.torch_compile_backend, args.torch_compile_mode)

    def _make_optimizer(self, optimizers: tuple[torch.optim.Optimizer | None, Any]) -> None:
        """What trains the networks, and the tensors that a step reads."""
        args, accelerator = self.args, self.accelerator
        if optimizers[0] is not None:
            model_checks.check_optimizer(optimizers[0], self.models)
        self.optimizer = optimizers[0] or setup.make_optimizer(self.models, args)
        self.lr_scheduler = optimizers[1] or setup.make_schedule(self.optimizer, args)
        # The schedule is not prepared: Accelerate would step it once per process.
        self.prepared, self.optimizer = prepare(accelerator, self.module, self.optimizer)
        self.device = accelerator.device
        means = (self.model_config.image_mean, self.model_config.image_std)
        self.image_mean, self.image_std = (torch.tensor(v, device=self.device) for v in means)
        self._progress = torch.zeros((), device=self.device)
        self._unlabeled_weight = torch.ones((), device=self.device)
        self._class_counts: Tensor | None = None  # of the labeled set, if the objective weights classes by frequency

    def _make_monitors(self, callbacks: list[TrainerCallback]) -> None:
        """What monitors the run, and what it writes."""
        args, accelerator = self.args, self.accelerator
        self.control = TrainerControl()
        self.late = Late(args, accelerator)
        self.guard = Guard(accelerator, self.module, args, self.state)
        self.signals = signals.StopSignals()
        self.streams: dict[str, TrainStream] = {}  # "labeled" and, if the objective has views, "unlabeled"
        self.run_log: RunLog | None = None
        self.unlabeled_weight = unlabeled_weight.UnlabeledWeight(args, self.state)
        acts = self.unlabeled_weight.is_auto
        self.watch = Watch(self.state, [*self.id2label.values()], self.module.labeling, acts=acts)
        self.evaluator = self._evaluator()
        self.run = self._run()
        pictures = self._pictures()
        self.exporter = self._exporter(pictures, do_reduce_labels=setup.reduces_labels(self.train_dataset))
        self.best = BestBranch(args, self.stages, self.state, self.exporter, self.late)
        self.callback_handler = Callbacks(
            self.late,
            [DefaultFlowCallback, *self._callbacks(pictures, callbacks)],
            self.module,
            self.processing_class,
            self.optimizer,
            self.lr_scheduler,
        )
        check_callbacks(self.callback_handler.callbacks)
        self.checkpointer = self._checkpointer()
        self.control = self.callback_handler.on_init_end(args, self.state, self.control)

    # ------------------------------------------------------------------------------------------------ training

    def train(self, resume_from_checkpoint: str | bool | None = None) -> dict[str, Any]:
        """Train to `args.max_steps` and export the branches.

        At the last step, the checkpoint and the branches are written first. What follows (evaluation, pictures, cards,
        trackers, callbacks, a push) may fail without losing either.

        Args:
            resume_from_checkpoint: a checkpoint's folder, true for the newest complete one, or "auto" for that one or
                a new run. If `None`, the value in `args`.

        Returns:
            The content of `results.json`.

        Raises:
            ValueError: the output folder or the checkpoint cannot be used, a sample cannot be read, `max_steps` was
                changed, or this trainer has trained before and no checkpoint to resume from is given.
            LockedError: another run is using the output folder (a ValueError).
            FloatingPointError: a loss or gradient is not finite; the last checkpoint is complete.
            torch.OutOfMemoryError: a batch does not fit; the message says what to change.
            DataWorkerError: a data worker died; the message says what to change.
            ConnectionError: another process died or does not respond.
            AfterTrainingError: training is done and saved, but something after its last step failed; the message says
                what, and how to complete it. It is an EvaluationError if the last evaluation failed.
            Preempted: a signal stopped the run, which is saved. If uncaught, the program exits with code 85.
        """
        args = self.args
        wanted = args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        if args.max_steps != self.state.max_steps:  # as are the schedule and the stages
            raise ValueError(
                f"This trainer was created for {self.state.max_steps} steps, and `max_steps` is now {args.max_steps}. "
                "Create another trainer with that value, and call `train(resume_from_checkpoint=True)` to continue."
            )
        if self.state.global_step and not wanted:
            raise ValueError(
                f"This trainer has already trained to step {self.state.global_step} of `max_steps` {args.max_steps}, "
                f"and its output is in {args.output_dir}. To continue after an interruption, call "
                "`train(resume_from_checkpoint=True)`. To train longer, create another trainer with larger "
                "`max_steps` and call the same; for another run, give that trainer another `output_dir`."
            )
        # Here, and not in the constructor: another trainer may have been created since. Weights are drawn already, and
        # dropout differs between processes.
        set_seed(args.seed, device_specific=True)
        self.late.failed.clear()
        with self.checkpointer.locked():
            with self._explained():
                streams = self._prepare(wanted)
                try:
                    with ExitStack() as stack:
                        stack.enter_context(deterministic_algorithms(args.full_determinism))
                        stack.enter_context(self.run_log.beside_bar())
                        self._loop(*streams, stack)
                    found = self._finish()
                except KeyboardInterrupt:
                    if self.state.global_step == self.state.first_step:
                        logger.warning("Stopped before step %d. No step is lost.", self.state.global_step + 1)
                    raise
                finally:
                    self.run_log.close()
                    self.run_log = None  # later logs belong to no run
                    self.late.active = False  # and later errors are raised
            self.late.tell(self.state.global_step, self.exporter.names)
        return found

    def _prepare(self, wanted: str | bool | None) -> tuple[TrainStream, TrainStream | None]:
        """Check everything before anything is written; then set up the folder for the run's first step.

        Args:
            wanted: the checkpoint, as in `train`.
        """
        args, accelerator = self.args, self.accelerator
        self._class_counts = setup.class_counts(
            args, accelerator, self.objective, self.train_dataset, num_labels=len(self.id2label)
        )
        checkpoint, saved = self.checkpointer.find(wanted, self._fingerprint, self._complete)
        if checkpoint:
            self._set_length(length_of(saved, args.max_steps))
        self.state.absent_classes = on_main_process(accelerator, self._check_labels)
        if args.auto_find_batch_size:
            self._fit_batch()
        streams = self._train_streams(saved["streams"])
        if self.eval_dataset is not None:
            self.evaluator.check_first_batch(self.eval_dataset)
        self.exporter.check_folders()
        self.checkpointer.prepare_output_dir(checkpoint, saved, setup.to_yaml(self.objective, *self.groups))
        if accelerator.is_main_process:
            setup.warn_of_little_space(args.output_dir, self.module, self.optimizer)
        if checkpoint:
            self.checkpointer.load(checkpoint, saved)
            if args.max_steps != saved["settings"]["max_steps"]:
                self.state.planned_steps = None  # this length is given
        setup.init_trackers(accelerator, args, self.run.settings, self.objective, self.state)
        self.run_log = RunLog(
            accelerator,
            args.output_dir,
            max_steps=args.max_steps,
            first_step=self.state.global_step,
            lines=saved.get("log_lines"),
            show_bar=not args.disable_tqdm,
        )
        self.state.log_history = self.run_log.read()
        return streams

    def _loop(self, labeled: TrainStream, unlabeled: TrainStream | None, stack: ExitStack) -> None:
        """The phases of an optimizer step, until the callbacks stop the run.

        Args:
            stack: what it enters is exited after the loop.
        """
        args, accelerator, state = self.args, self.accelerator, self.state
        self.streams = {"labeled": labeled} | ({"unlabeled": unlabeled} if unlabeled else {})
        labeled_batches = iter(labeled)
        unlabeled_batches = iter(unlabeled) if unlabeled else None
        if (left := args.max_steps - state.global_step) > 0:
            logger.info("Training: %d step%s on %s ...", left, "" if left == 1 else "s", self.device)
        self.control = self.callback_handler.on_train_begin(args, state, self.control)
        self._begin()
        self.prepared.train()
        while not self.control.should_training_stop:
            if state.global_step in (state.first_step, self.stages.border, self.stages.unlabeled_end):
                self._begin_stage()
            reads_unlabeled = self.stages.reads_unlabeled(state.global_step)
            self.control = self.callback_handler.on_step_begin(args, state, self.control)
            state.stopwatch.start()
            # fetch: the micro-batches of the whole step, since losses are divided by its global counts
            micro_batches = [
                self._fetch(labeled_batches, unlabeled_batches if reads_unlabeled else None)
                for _ in range(args.gradient_accumulation_steps)
            ]
            if state.global_step == state.first_step:
                # Until now there was no step to save, so a signal stopped the run at once.
                stack.enter_context(self.signals)
            batches.share_counts(
                micro_batches, accelerator, self._class_counts, with_targets=self.objective.labeled_loss == "set"
            )
            self._progress.fill_(self.stages.progress(state.global_step))
            self._unlabeled_weight.fill_(self.unlabeled_weight.value)
            self.guard.before_step()
            # forward, backward
            outputs = [self._forward_backward(batch) for batch in micro_batches]
            # stop if not finite, clip
            verdict = self.guard.judge(self.optimizer, told_to_stop=bool(self.signals.received))
            if verdict.finite:
                # step
                self.optimizer.step()
            else:
                self.guard.reject(state.global_step + 1, verdict, micro_batches, outputs)
            self.lr_scheduler.step()
            self.optimizer.zero_grad()
            state.global_step += 1
            self._anneal_masked_attention()
            self.late.active = state.global_step >= args.max_steps
            # teacher, averages
            if verdict.finite:
                self._update_averages()
            if state.global_step == state.first_step + 1 and self.objective.min_branches > 1:
                model_checks.reject_equal_branches(self.module.branches, accelerator, state.global_step)
            read = [labeled, unlabeled] if reads_unlabeled else [labeled]
            state.stopwatch.stop(sum(stream.shard.global_batch_size for stream in read))
            self.run_log.advance()
            # save, log, evaluate
            self.control = self.callback_handler.on_step_end(args, state, self.control)
            self.control.should_save |= verdict.stop
            if self.stages.is_border(state.global_step):
                self.control.should_log = self.control.should_evaluate = self.control.should_save = True
            self._save_log_evaluate()
            if verdict.stop and not self.control.should_training_stop:
                signals.leave(accelerator, args.output_dir, state.global_step, self.signals.received)

    def _begin(self) -> None:
        """Before the first step: measure the agreement in a new run, or do what a resumed run's checkpoint lists as
        pending."""
        state, control = self.state, self.control
        self._anneal_masked_attention()
        if state.global_step == 0:
            self._measure_agreement("start")
        control.should_training_stop |= state.global_step >= self.args.max_steps
        self.late.active = control.should_training_stop
        if control.should_training_stop and self.eval_dataset is not None and not state.scores:
            state.pending |= {"evaluate": True}  # resumed at the end, with another evaluation set
        if control.should_training_stop:
            self._export_all()
        if state.pending and self.stages.is_border(state.global_step):
            self._export_supervised()
        if state.pending:
            logger.info("Step %d: doing what its checkpoint lists as pending.", state.global_step)
            self._do_pending()
            self.checkpointer.amend(self._stream_states())
        if control.should_training_stop:
            self.best.settle()

    def _begin_stage(self) -> None:
        """Activate the stage's objective. The second stage's optimizer does not know the first stage's steps."""
        step, stages = self.state.global_step, self.stages
        if stages.is_border(step) and self.state.max_steps != self.args.max_steps:  # changed by a callback
            self.state.planned_steps = self.args.max_steps
            self._set_length(self.state.max_steps)
        self.module.objective = stages.objective_after(step)
        last = stages.border if stages.is_first(step) else self.args.max_steps
        said = stages.describe(step)
        self.run_log.begin_stage(stages.describe_briefly(step), step, last, self.args.max_steps)
        if said:
            logger.info("Steps %d to %d are %s.", step + 1, last, said)
        if stages.is_border(step):
            self.optimizer.state.clear()

    def _set_length(self, max_steps: int) -> None:
        """Make this the run's length, also in what its next checkpoint says."""
        args = self.args
        args.max_steps = self.run.settings["max_steps"] = max_steps
        interval = setup.run_state(args, self.accelerator)
        for name in ("max_steps", "eval_steps", "save_steps"):
            setattr(self.state, name, getattr(interval, name))

    def _fetch(self, labeled: Iterator[dict], unlabeled: Iterator[dict] | None) -> MicroBatch:
        """The next micro-batch on the device, with normalised images. Replaced samples are recorded."""
        fetched = [next(stream) for stream in (labeled, unlabeled) if stream is not None]
        bad_samples = [bad for batch in fetched for bad in batch["bad_samples"]]
        if bad_samples:
            self.run_log.write_bad_samples(bad_samples, self.state.global_step + 1)
        on_device = [batches.to_device(batch, self.device, self.image_mean, self.image_std) for batch in fetched]
        ids = {kind: batch["ids"] for kind, batch in zip(("labeled", "unlabeled"), fetched, strict=False)}
        return MicroBatch(on_device[0], on_device[1] if unlabeled is not None else None, ids)

    def _forward_backward(self, batch: MicroBatch) -> ObjectiveOutput:
        """One micro-batch. Gradients accumulate. (Accelerate divides by the accumulation steps.)"""
        setup.set_accumulation(self.accelerator, self.args)
        with self.accelerator.accumulate(self.prepared):
            output = self.prepared(batch.labeled, batch.unlabeled, self._progress, **self._scaled(batch))
            self.accelerator.backward(output.loss)
        output = output._replace(loss=output.loss.detach())
        share = 1 / self.args.gradient_accumulation_steps
        # A mean over branches, like its parts; the sum is differentiated.
        self.state.averages.add({"loss": output.loss / len(self.models), **output.logs}, share)
        return output

    def _scaled(self, batch: MicroBatch) -> dict[str, Tensor]:
        """The factor on the unlabeled term, if it is set: a user's method may not support it."""
        scales = batch.unlabeled is not None and self.args.unlabeled_weight != 1
        return {"unlabeled_weight": self._unlabeled_weight} if scales else {}

    def _anneal_masked_attention(self) -> None:
        """A function of the step; a checkpoint saved after a step has the next step's probabilities."""
        for model, beginning in self._masked_attention:
            anneal_masked_attention(model, beginning, self.stages.masks_annealed(self.state.global_step))

    def _update_averages(self) -> None:
        """Update the moving averages with this step. A teacher starts with the second stage; until then it is a copy
        of its branch."""
        module, step = self.module, self.state.global_step
        if module.teacher is not None:
            in_stage = step - self.stages.border
            decay = self.objective.ema_decay(in_stage) if in_stage > 0 else 0.0
            update_teacher(module.teacher, module.branches[0], decay)
        for average, branch in zip(module.averages or (), module.branches, strict=False):
            update_teacher(average, branch, warmed_up(self.args.ema_decay, step))

    def _save_log_evaluate(self) -> None:
        """Save weights first: what follows may fail, and the checkpoint lists what is still to be done."""
        control, state = self.control, self.state
        self.late.active |= control.should_training_stop
        ends = control.should_training_stop
        if ends:
            self.run_log.end(state.global_step)
        saves = control.should_save or ends
        logs = control.should_log or (ends and state.averages.steps > 0)
        state.pending = {"log": self._means() if logs else None, "evaluate": control.should_evaluate or ends}
        if saves or state.pending["evaluate"]:
            self.checkpointer.check_lock()
        if saves:
            self._save()
        if self.stages.is_border(self.state.global_step):
            self._export_supervised()
        if ends:
            self._export_all()
        self._do_pending()
        if control.should_training_stop or self.control.should_training_stop:
            self.best.settle()
        if saves:
            self.checkpointer.amend(self._stream_states())
        self.late.active |= self.control.should_training_stop
        if not saves and (self.control.should_save or self.control.should_training_stop):
            saves = True  # requested by a callback that saw the scores
            self._save()
        if self.control.should_training_stop and not ends:
            self.run_log.end(state.global_step)
            self._export_all()
        if saves and CHECKPOINT not in self.late.failed:
            self.control = self.callback_handler.on_save(self.args, state, self.control)

    def _do_pending(self) -> None:
        """Log, evaluate and keep the best. Failures are reported, do not stop training, and stay pending."""
        pending = self.state.pending
        if pending.get("log"):
            self.log(pending["log"])
            pending["log"] = None
        if pending.get("evaluate"):
            try:
                metrics = self._score()
            except Exception as error:
                self.state.scores, self.state.image_counts = {}, {}
                self.late.keep(EVALUATION, error)
            else:
                self.late.failed.pop(EVALUATION, None)
                pending |= {"evaluate": False, "best": True}
                self._compare()
                self._report(metrics | self._watch_pseudo_labels())
        if pending.get("best"):
            try:
                self.best.keep()
            except Exception as error:
                self.late.keep("best", error)
            else:
                self.late.failed.pop("best", None)
                pending["best"] = False
        if self.stages.is_border(self.state.global_step):
            self._keep_supervised()
        self.state.pending = {name: value for name, value in pending.items() if value}

    def _keep_supervised(self) -> None:
        """Keep the first stage's results, with which the second stage is compared."""
        state = self.state
        state.stages, state.supervised_seconds = {"supervised": state.scores}, state.stopwatch.total["seconds"]
        if state.image_counts:  # empty if the evaluation was done before the run was resumed
            state.supervised_counts = {row: comparison.pack(counts) for row, counts in state.image_counts.items()}
        said = ", ".join(f"{row} {mean_iou_in_words(found)}" for row, found in state.scores.items())
        logger.info("Stage 1 of 2 is done at step %d: %s.", state.global_step, said or "no scores")

    def _compare(self) -> None:
        """Compare the second stage with the first by the newest scores: what the unlabeled images changed."""
        state = self.state
        if self.objective.views and state.supervised_counts and state.global_step > self.stages.border:
            before = {row: comparison.unpack(packed) for row, packed in state.supervised_counts.items()}
            state.comparison = comparison.compare(before, state.image_counts, [*self.id2label.values()])

    def _watch_pseudo_labels(self) -> dict[str, float]:
        """What to log about pseudo labels after an evaluation, which may lower the unlabeled term's weight."""
        step, agreed_accuracy = self.state.global_step, self.evaluator.agreed_accuracy
        if not self.state.scores or not self.objective.views:
            return {}
        if self.stages.is_border(step):
            self.watch.begin(agreed_accuracy)
        if not self.stages.reads_unlabeled(step - 1):
            return {}
        numbers, has_fallen = self.watch.look(agreed_accuracy)
        if has_fallen and self.unlabeled_weight.is_auto:
            self.unlabeled_weight.lower()
        return numbers

    def _means(self) -> dict[str, float]:
        """The record of the steps since the last one."""
        state, means = self.state, self.state.averages.read()
        shares = [name for name in means if name.startswith(ONE_CLASS)]
        state.one_class = {name.removeprefix(ONE_CLASS): means.pop(name) for name in shares}
        means |= {"skipped_steps": state.skipped_steps} if self.args.max_skipped_steps else {}
        means["learning_rate"] = setup.current_learning_rate(self.optimizer)
        if self.stages.border:
            means["stage"] = 1.0 if state.global_step <= self.stages.border else 2.0
        if self.args.unlabeled_weight != 1 and state.global_step > self.stages.border:
            means["unlabeled_weight"] = self.unlabeled_weight.value
        means |= self._epochs()
        state.epoch = means.get("labeled_epoch")
        return {**means, "images_per_second": state.stopwatch.read()}

    def _epochs(self) -> dict[str, float]:
        """How often each stream has passed through its images; for a streamed set, once its length is known."""
        lengths = {name: stream.state()["length"] for name, stream in self.streams.items()}
        return {f"{name}_epoch": self._position(name) / count for name, count in lengths.items() if count}

    def _finish(self) -> dict[str, Any]:
        """Write results.json, and run the callbacks that draw, describe and push."""
        self.late.active = True
        content = results.summary(self.run, self.state)
        with self.late.attempt("results.json"), together(self.accelerator):
            if self.accelerator.is_main_process:
                text = json.dumps(without_nan(content), indent=1)
                write_atomically(Path(self.args.output_dir) / "results.json", text)
                if line := absent_line(self.state.absent_classes, len(self.id2label)):
                    logger.warning("%s", line)
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        return content

    def log(self, logs: dict[str, float]) -> None:
        """Log named numbers to metrics.jsonl, the trackers, the progress bar and the callbacks."""
        self.state.log_history.append({**logs, "step": self.state.global_step})
        if self.run_log is not None:
            self.run_log.write(logs, self.state.global_step)
            self.run_log.show(logs, self.state.global_step)
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)

    # ------------------------------------------------------------------------------------------------ evaluation

    def evaluate(self, eval_dataset=None, *, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Score every branch, the teacher if any, and the branches' mean, on whole images.

        Returns:
            `<prefix>_mean_iou` (of the best single branch: what can be exported), `<prefix>_<row>_mean_iou`,
            `_mean_accuracy` and `_overall_accuracy` for each row, `<prefix>_agreed_accuracy` (`Evaluator.scores`),
            `<prefix>_agreement` and the share of the most common class in the predictions, `<prefix>_commonest_class`;
            `<prefix>_iou_<class>` (of the best single branch) and `<prefix>_<row>_iou_<class>`. Fractions; NaN for a
            class that occurs neither in the labels nor in the predictions. Scores of another set than the run's are
            not part of the run's results. Empty without an evaluation set.
        """
        metrics = self._score(eval_dataset, metric_key_prefix)
        self._report(metrics)  # without the classes: a tracker would draw a curve for each
        return metrics | self._ious_by_class(metric_key_prefix)

    def _ious_by_class(self, prefix: str) -> dict[str, float]:
        """Of the newest scores."""
        if not self._newest_scores:
            return {}
        best, found = self.best.row_of(self._newest_scores), {}
        for row, scores in self._newest_scores.items():
            for name, iou in zip(self.id2label.values(), scores["per_category_iou"], strict=True):
                found[f"{prefix}_{row}_iou_{name}"] = iou
                if row == best:
                    found[f"{prefix}_iou_{name}"] = iou
        return found

    def _score(self, eval_dataset=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """The result of `evaluate`."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        metrics: dict[str, float] = {}
        self._newest_scores: dict[str, dict[str, Any]] = {}
        self.module.share_buffers(self.accelerator)
        if dataset is not None:
            by_row = self._newest_scores = self.evaluator.scores(dataset)
            metric = self.args.metric_for_best_model
            metrics = {f"{metric_key_prefix}_{metric}": by_row[self.best.row_of(by_row)][metric]}
            for row, scores in by_row.items():
                for key in ("mean_iou", "mean_accuracy", "overall_accuracy"):
                    metrics[f"{metric_key_prefix}_{row}_{key}"] = scores[key]
            if self.evaluator.agreed_accuracy is not None:
                metrics[f"{metric_key_prefix}_agreed_accuracy"] = self.evaluator.agreed_accuracy
            if eval_dataset is None:
                self.state.scores, self.state.image_counts = by_row, self.evaluator.image_counts
        if eval_dataset is None:
            agreement = self._agreement_at_the_end()
            metrics |= {f"{metric_key_prefix}_{name}": value for name, value in agreement.items()}
        return metrics

    def _report(self, metrics: dict[str, float]) -> None:
        if metrics:
            self.log(metrics)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)

    def predict(self, dataset, *, branch: int | str = "best") -> Iterator[tuple[str, Tensor]]:
        """Yield (id, uint8 (H, W) class ids) of each image in this process's share, at the image's own size.

        Args:
            dataset: needs "image"; labels are not read.
            branch: "best": the content of `best`, that is the best branch at its best step, or branch 0 if nothing was
                evaluated. In its current state: a number, "<number>_average", "teacher", or "mean" (of the branches'
                probabilities).
        """
        if branch == "mean":
            networks = [*self.module.branches]
        else:
            networks = [self._best_network() if branch == "best" else self.exporter.network(branch)]
        return self.evaluator.predictions(dataset, networks)

    def _best_network(self) -> torch.nn.Module:
        """The network in `best`, loaded from there, since training has continued."""
        folder = Path(self.args.output_dir) / "best"
        if not self.state.best or not folder.is_dir():
            return self.exporter.network(0)
        kind = type(self.exporter.network(self.state.best["branch"]).model)
        model = kind.from_pretrained(folder)
        if hasattr(model.config, "input_shrink"):
            model.config.input_shrink = 1  # the evaluator shrinks images for all branches
        return Branch(model).to(self.device)

    def _measure_agreement(self, when: str) -> dict[str, float]:
        """The result of `Evaluator.agreement` on a fixed set of unlabeled images; stored under `when`."""
        if not (self.args.agreement_images and len(self.models) > 1 and self.unlabeled_dataset is not None):
            return {}
        images = decodable(setup.evenly_spaced(self.unlabeled_dataset, self.args.agreement_images))
        if images is None:
            return {}
        found = self.evaluator.agreement(images)
        self.state.agreement[when], self.state.commonest_class[when] = found
        if when == "start":
            self.log({f"eval_{name}": value for name, value in found._asdict().items()})
        return found._asdict()

    def _agreement_at_the_end(self) -> dict[str, float]:
        """Empty also if it cannot be measured, e.g. because of a broken unlabeled image: the scores do not need it."""
        try:
            return self._measure_agreement("end")
        except Exception as error:
            if failures.is_connection_error(error):
                raise
            logger.warning("The branches' agreement is not measured: %s", failures.told(error, self.args))
            return {}

    # ------------------------------------------------------------------------------------------------ saving

    def _save(self) -> None:
        self.module.share_buffers(self.accelerator)
        with self.late.attempt(CHECKPOINT):
            self.checkpointer.save(self._stream_states())

    def _export_all(self) -> None:
        for name in self.exporter.names:
            with self.late.attempt(name):
                self.exporter.export(name)

    def _export_supervised(self) -> None:
        for name, folder in self.exporter.supervised.items():
            self.exporter.export(name, folder)

    def save_model(self, output_dir: str | os.PathLike | None = None, *, branch: int | str = 0) -> None:
        """Export one branch: weights, config, image processor and card, without anything of the other branches.

        Args:
            branch: a number, "<number>_average" or "teacher".
            output_dir: if `None`, `branch_<branch>` (or `teacher`) in `args.output_dir`.
        """
        self.exporter.export(self.exporter.name_of(branch), None if output_dir is None else Path(output_dir))

    def push_to_hub(
        self, commit_message: str = "End of training", *, branch: int | str | None = None, tag: str | None = None
    ) -> str | None:
        """Push a branch now and wait for it: the best one, or `branch` (a number, "teacher") in its current state.

        Returns the commit's URL (`None` except on the main process). Raises like `push.push_branch`.
        """
        if branch is not None:
            self.save_model(branch=branch)
        if not self.accelerator.is_main_process:
            return None
        name = "best" if self.state.best else "branch_0"
        if branch is not None:
            name = self.exporter.name_of(branch)
        return push_branch(
            Path(self.args.output_dir) / name,
            repo_id_of(self.hub.hub_model_id, self.args.output_dir),
            private=self.hub.hub_private_repo,
            token=self.hub.hub_token,
            revision=self.hub.hub_revision,
            tag=tag,
            commit_message=commit_message,
        )

    # ------------------------------------------------------------------------------------------------ streams

    def next_ids(self, count: int = 20) -> dict[str, list[str]]:
        """The ids of each stream's next samples, in the global order over all processes, once training has begun."""
        return {name: stream.ids(self._position(name), count) for name, stream in self.streams.items()}

    def _position(self, name: str) -> int:
        """Where the next step begins in the global order of the "labeled" or the "unlabeled" stream."""
        stream, state = self.streams[name], self.state
        steps = self.stages.steps_of(name, state.global_step) - self.stages.steps_of(name, state.first_step)
        return stream.start + steps * stream.shard.global_batch_size

    def _stream_states(self) -> dict[str, dict[str, Any]]:
        return {name: {"position": self._position(name)} | s.state() for name, s in self.streams.items()}

    def _train_streams(self, starts: dict[str, Any]) -> tuple[TrainStream, TrainStream | None]:
        return setup.train_streams(
            self.args,
            self.augmentation,
            self.accelerator,
            self.objective,
            self.train_dataset,
            self.unlabeled_dataset,
            starts,
            num_labels=len(self.id2label),
        )

    def _first_micro_batch(self) -> tuple[Any, Any]:
        """The first labeled and unlabeled batch of a new run, on the device."""
        to_device = (self.device, self.image_mean, self.image_std)
        streams = self._train_streams({})
        return tuple(None if s is None else batches.to_device(next(iter(s)), *to_device) for s in streams)

    # ------------------------------------------------------------------------------------------------ parts

    def add_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        """Add a callback: an object, or a class that is instantiated without arguments."""
        callback = callback() if isinstance(callback, type) else callback
        check_callbacks([callback])
        self.callback_handler.add_callback(callback)

    def remove_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        """Remove a callback by object or class: `trainer.remove_callback(PicturesCallback)`."""
        self.callback_handler.remove_callback(callback)

    def _callbacks(self, pictures: Pictures, own: list[TrainerCallback]) -> list[TrainerCallback]:
        """The default callbacks, except those that the user's replace, then the user's. The push is last: it sends the
        results of the others."""
        args, is_main = self.args, self.accelerator.is_main_process
        draw = PicturesCallback(pictures, self.accelerator, args.output_dir, metric=args.metric_for_best_model)
        report = ReportCallback(pictures, self.accelerator, args.output_dir, metric=args.metric_for_best_model)
        ours = [CollapseCallback(), draw, report, ModelCardCallback(self.exporter)]
        if args.early_stopping_patience:
            ours.append(EarlyStopping(args.early_stopping_patience, self.stages.border))
        ours = [callback for callback in ours if not any(_derives(one, type(callback)) for one in own)]
        if self.hub.push_to_hub and not any(_derives(one, PushCallback) for one in own):
            with together(self.accelerator):  # the main process contacts the Hub
                own = [*own, PushCallback(self.hub, args.output_dir, self.exporter, is_main_process=is_main)]
        return [*ours, *own]

    def _evaluator(self) -> Evaluator:
        return Evaluator(
            self.module,
            self.accelerator,
            self.evaluation,
            num_labels=len(self.id2label),
            crop_size=self.augmentation.crop_size,
            image_mean=self.model_config.image_mean,
            image_std=self.model_config.image_std,
            num_workers=self.args.dataloader_num_workers,
            skip_bad_samples=self.args.skip_bad_samples,
        )

    def _run(self) -> results.Run:
        return results.Run(
            settings=flat(*self.groups),
            objective=self.objective,
            models=self.models,
            id2label=self.id2label,
            num_labeled=setup.length(self.train_dataset),
            num_unlabeled=setup.length(self.unlabeled_dataset),
            eval_options=self.evaluator.options,
            backbone_sources=[self.model_config.backbone_source(i) for i in range(len(self.models))],
            license=self.hub.hub_license,
            num_processes=self.accelerator.num_processes,
            device=self.device,
            stages=self.stages,
        )

    def _pictures(self) -> Pictures:
        return Pictures(
            self.evaluator,
            self.eval_dataset,
            [*self.id2label.values()],
            count=self.evaluation.num_pictures,
            may_leave=self.hub.push_pictures,
        )

    def _exporter(self, pictures: Pictures, *, do_reduce_labels: bool) -> BranchExporter:
        return BranchExporter(
            self.run,
            self.state,
            self.module,
            self.accelerator,
            image_mean=self.model_config.image_mean,
            image_std=self.model_config.image_std,
            do_reduce_labels=do_reduce_labels,
            processing_class=self.processing_class,
            pictures=pictures,
        )

    def _checkpointer(self) -> Checkpointer:
        return Checkpointer(
            self.args,
            self.accelerator,
            state=self.state,
            optimizer=self.optimizer,
            lr_scheduler=self.lr_scheduler,
            callbacks=self.callback_handler.callbacks,
            settings=self.run.settings,
            evaluates=self.eval_dataset is not None,
        )

    def _fingerprint(self) -> dict[str, Any]:
        return fingerprint(
            self.groups,
            self.objective,
            self.models,
            train_dataset=self.train_dataset,
            unlabeled_dataset=self.unlabeled_dataset,
            eval_dataset=self.eval_dataset,
            optimizer=self.optimizer,
            lr_scheduler=self.lr_scheduler,
            accelerator=self.accelerator,
            class_counts=self._class_counts,
            labelers=[labeler.sha256() for labeler in self.labelers],
        )

    def _complete(self, saved: dict[str, Any]) -> dict[str, Any]:
        return with_new_fields(saved, self.groups, self.objective)

    def _check_labels(self) -> dict[str, list[str]]:
        return check_labels(self.args, self.train_dataset, self.eval_dataset, [*self.id2label.values()])

    def _fit_batch(self) -> None:
        memory.fit_batch(
            self.args,
            self.augmentation.crop_size,
            self.accelerator,
            self.module,
            self.optimizer,
            self._first_micro_batch,
            unlabeled=bool(self.objective.views),
        )

    def _explained(self):
        reads_unlabeled = bool(self.objective.views)
        crop_size = self.augmentation.crop_size
        return failures.explained(self.args, crop_size, self.accelerator, self.state, unlabeled=reads_unlabeled)


def _derives(callback: TrainerCallback | type[TrainerCallback], kind: type[TrainerCallback]) -> bool:
    return issubclass(callback if isinstance(callback, type) else type(callback), kind)


def _accelerator(args: CPSConfig) -> Accelerator:
    return Accelerator(
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
