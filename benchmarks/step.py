"""The parts of one optimizer step of `CPSTrainer`, compared with its floor.

    python benchmarks/step.py --objective cps --cutmix true --model deeplabv3plus-r50 --batch 2 --crop 128 --steps 7

The floor is what every implementation of the method needs: the step's network passes, with the same networks on the
same tensors (including those without gradient), and the backward passes from `logits.float().mean()`; in a network
with queries, from the means of its class and mask logits, in every layer that the step trains. The step is the
trainer's own, from one `on_step_begin` to the next: waiting for data, transfer, forwards, loss, backward, the check of
numbers and norms, logging. The optimizer (with the teacher's update) is not in the floor and is listed separately.

    overhead = median(step - optimizer) / median(floor)

Steps and floors alternate in one process, at least 7 pairs after 2 that do not count. On a CPU, times are the
process's CPU time (data come from workers, as in training). On a GPU, they are wall-clock time, with a wait for the
device at both ends of a step, and `overhead` excludes the loss, whose share of the step is listed. The loss is
measured separately, once per pair: the objective on the recorded logits, forward and backward. Timing the parts makes
a GPU wait at each of them, so on GPUs every second step is timed in parts and the others as a whole. `host_reads` are
transfers from the device that the host waits for, counted over one more step. `memory` is the peak of another step and
of its floor, above what is allocated before it (weights and optimizer states): activations, gradients and temporaries.
`--profile` lists the kernels of another one.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import logging
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from small_models import SMALL
from transformers import SegformerConfig, TrainerCallback

import cps_hf.training.trainer
from cps_hf import OBJECTIVES, CPSTrainer
from cps_hf.checkpointing.fingerprint import versions
from cps_hf.commands import parser as command_line
from cps_hf.commands.settings import Settings
from cps_hf.data.voc import load_voc
from cps_hf.modeling import universal
from cps_hf.modeling.set_loss import Layer
from cps_hf.scenes.write import write_object_scenes
from cps_hf.training import batches

CONFIGS = Path(__file__).parents[1] / "examples/configs/models"
MODELS = {
    "deeplabv3plus-r50": str(CONFIGS / "deeplabv3_plus_r50.json"),
    "deeplabv3plus-r101": str(CONFIGS / "deeplabv3_plus_r101.json"),
    "hrnet-w48": str(CONFIGS / "hrnet_w48.json"),
    "dpt-dinov2-b": str(CONFIGS / "dpt_dinov2_b.json"),
    "vit-dpt-dinov2-s": str(CONFIGS / "vit_dpt_dinov2_s.json"),
    "upernet-swin-t": str(CONFIGS / "upernet_swin_t.json"),
    "segformer-b2": SegformerConfig(
        depths=[3, 4, 6, 3], hidden_sizes=[64, 128, 320, 512], decoder_hidden_size=768, num_labels=21
    ),
    **SMALL,
}
WARM_UP, LEAST_PAIRS = 2, 7
OPTIMIZER = ("optimizer", "teacher")  # what changes weights
SUPERVISED, UNSUPERVISED, PSEUDO = "supervised forward", "unsupervised forward", "pseudo-label forwards"
ORDER = ("data wait", "transfer", "counts", PSEUDO, SUPERVISED, UNSUPERVISED, "loss", "backward", "check and clip")
ORDER += (*OPTIMIZER, "logging", "rest")


class Parts:
    """Time by part; what runs inside another part is not counted twice. If not `apart`, everything is "rest"."""

    def __init__(self, clock):
        self.clock, self.spent, self.stack = clock, defaultdict(float), []
        self.since, self.apart = clock(), True

    def enter(self, name: str) -> None:
        self._charge()
        self.stack.append(name)

    def leave(self) -> None:
        self._charge()
        self.stack.pop()

    def _charge(self) -> None:
        if self.apart:
            self._add()

    def _add(self) -> None:
        now = self.clock()
        self.spent[self.stack[-1] if self.stack else "rest"] += now - self.since
        self.since = now

    def take(self) -> dict[str, float]:
        """The time since the last call."""
        self._add()
        spent, self.spent = dict(self.spent), defaultdict(float)
        return spent

    def timed(self, name: str, function):
        def wrapper(*args, **kwargs):
            self.enter(name)
            try:
                return function(*args, **kwargs)
            finally:
                self.leave()

        return wrapper


class Enough(Exception):
    """Raised when all pairs are measured, so that nothing is evaluated or saved."""


class Measuring(TrainerCallback):
    """Time the trainer's parts, and run the floor and the loss between two steps."""

    def __init__(self, pairs: int, on_gpu: bool, profile: bool):
        self.on_gpu, self.clock = on_gpu, _gpu_clock if on_gpu else time.process_time
        self.wanted, self.parts = WARM_UP + pairs * (2 if on_gpu else 1), Parts(self.clock)
        self.rows: list[dict] = []  # by pair: "step", "floor", "loss alone" and "parts", in seconds; "peak" bytes
        self.passes: list[tuple] = []  # of the newest step: branch, images, options, with gradient, logits
        self.arguments: list[tuple] = []  # of the newest step: the arguments of the training module
        self.extras = [self._count_reads, self._measure_memory]  # of one more step each
        self.extras += [self._record_kernels] if profile else []
        self.watching: contextlib.ExitStack | None = None
        self.host_reads: list[str] = []
        self.memory: dict[str, int] = {}  # peak bytes of the "step" and of its "floor"
        self.kernels: torch.profiler.profile | None = None

    @contextlib.contextmanager
    def attached(self, trainer: CPSTrainer):
        """Time the trainer's functions inside this context, and restore them afterwards."""
        self.trainer, parts = trainer, self.parts
        timed = (
            (trainer, "_fetch", "data wait"),
            (batches, "to_device", "transfer"),
            (batches, "share_counts", "counts"),
            (trainer.guard, "judge", "check and clip"),
            (trainer, "_save_log_evaluate", "logging"),
            (trainer.accelerator, "backward", "backward"),
            (trainer.optimizer, "step", "optimizer"),
            (trainer.optimizer, "zero_grad", "optimizer"),
            (cps_hf.training.trainer, "update_teacher", "teacher"),
        )
        with contextlib.ExitStack() as stack:
            for owner, name, part in timed:
                stack.enter_context(mock.patch.object(owner, name, parts.timed(part, getattr(owner, name))))
            trainer.module.register_forward_pre_hook(self._before_module)
            trainer.module.register_forward_hook(lambda *_: parts.leave())
            for network in self._networks():
                network.register_forward_pre_hook(self._before_network)
                network.register_forward_hook(self._after_network, with_kwargs=True)
            yield

    def _networks(self):
        return [*self.trainer.module.networks().values()]

    def _before_module(self, module, args) -> None:
        self.parts.enter("loss")
        self.arguments.append(args)

    def _before_network(self, network, args) -> None:
        with_gradient = torch.is_grad_enabled()
        seen = any(one is network and gradient for one, _, _, gradient, _ in self.passes)
        self.parts.enter(PSEUDO if not with_gradient else UNSUPERVISED if seen else SUPERVISED)

    def _after_network(self, network, args, options, logits) -> None:
        self.parts.leave()
        if options.get("layers"):  # as the pass has filled the list
            options = options | {"layers": [Layer(*(t.detach() for t in layer)) for layer in options["layers"]]}
        self.passes.append((network, args[0], options, torch.is_grad_enabled(), logits.detach()))

    def on_step_begin(self, args, state, control, **kwargs):
        """A step has ended, including its logging: measure its floor."""
        spent = self.parts.take()
        if self.watching:
            self.watching.close()
        elif self.passes:
            self.rows.append(self._row(spent))
        self.passes, self.arguments = [], []
        if len(self.rows) == self.wanted:
            if not self.extras:
                raise Enough
            self.watching = contextlib.ExitStack()
            self.extras.pop(0)(self.watching)
        self.parts.apart = not self.on_gpu or len(self.rows) % 2 == 0
        self.parts.take()

    def _row(self, spent: dict[str, float]) -> dict:
        row = {"step": sum(spent.values()), "passes": len(self.passes)}
        if self.parts.apart:
            row["parts"] = spent
        if self.on_gpu:
            row["peak"] = torch.cuda.max_memory_allocated()
        row["floor"], row["loss alone"] = self.floor(self.passes), self.loss_alone(self.passes, self.arguments)
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        return row

    def _count_reads(self, stack: contextlib.ExitStack) -> None:
        counting = counting_host_reads(lambda: self.parts.stack[-1:] != ["data wait"])
        self.host_reads = stack.enter_context(counting)

    def _measure_memory(self, stack: contextlib.ExitStack) -> None:
        def of_the_floor() -> None:
            with peak_memory(self.on_gpu) as found:
                self.floor(self.passes)
            self.memory = {"step": step[0], "floor": found[0]}

        stack.callback(of_the_floor)  # after the step's has ended
        step = stack.enter_context(peak_memory(self.on_gpu))

    def _record_kernels(self, stack: contextlib.ExitStack) -> None:
        kinds = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] * self.on_gpu)]
        self.kernels = stack.enter_context(torch.profiler.profile(activities=kinds))

    @contextlib.contextmanager
    def aside(self):
        """Run code outside the training: hooks off, gradients and random numbers restored."""
        modules = [self.trainer.module, *self._networks()]
        hooks = [(module._forward_pre_hooks, module._forward_hooks) for module in modules]
        for module, (before, after) in zip(modules, hooks, strict=True):
            module._forward_pre_hooks, module._forward_hooks = type(before)(), type(after)()
        try:
            with torch.random.fork_rng():
                yield
        finally:
            for module, (before, after) in zip(modules, hooks, strict=True):
                module._forward_pre_hooks, module._forward_hooks = before, after
            self.trainer.module.zero_grad()

    def floor(self, passes) -> float:
        with self.aside(), mock.patch.object(universal, "class_scores", _mean_of_queries):
            start = self.clock()
            means, labeled = [], {*self._networks()}  # networks whose first pass with gradient is to come
            on_unlabeled = getattr(self.trainer.objective, "unlabeled_loss", None) == "set"
            with self.trainer.accelerator.autocast():
                for network, images, options, with_gradient, _ in passes:
                    layers = [] if options.get("layers") else None
                    with torch.set_grad_enabled(with_gradient):
                        mean = network(images, **options | {"resize": False, "layers": layers}).float().mean()
                    if with_gradient:
                        trains_layers = layers and (network in labeled or on_unlabeled)
                        means += [_mean_of_queries(*layer) for layer in layers] if trains_layers else [mean]
                        labeled.discard(network)
            sum(means).backward()
            return self.clock() - start

    def loss_alone(self, passes, arguments) -> float:
        """Forward and backward of the objective with networks that return the recorded logits."""
        left = [
            (network, logits.requires_grad_(gradient), [Layer(*(t.requires_grad_() for t in one)) for one in layers])
            for network, _, options, gradient, logits in passes
            for layers in [options.get("layers") or []]
        ]

        def replay(network):
            def forward(*args, layers=None, **options):
                index = next(i for i, (one, *_) in enumerate(left) if one is network)
                _, logits, recorded = left.pop(index)
                if layers is not None:
                    layers += recorded
                return logits

            return forward

        with self.aside():
            for network in self._networks():
                network.forward = replay(network)
            try:
                start = self.clock()
                with self.trainer.accelerator.autocast():
                    losses = [self.trainer.module(*one).loss for one in arguments]
                sum(losses).backward()
                return self.clock() - start
            finally:
                for network in self._networks():
                    del network.forward


def _mean_of_queries(class_logits: torch.Tensor, mask_logits: torch.Tensor) -> torch.Tensor:
    """What the floor differentiates instead of class scores."""
    return class_logits.float().mean() + mask_logits.float().mean()


@contextlib.contextmanager
def peak_memory(on_gpu: bool):
    """Yields a list, to which the peak of allocated bytes above those at the beginning is appended at the end."""
    found: list[int] = []
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield found
        found.append(torch.cuda.max_memory_allocated() - before)
        return
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        yield found
    changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = itertools.accumulate(event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns()))
    found.append(max(held, default=0))


class _Reads(torch.utils._python_dispatch.TorchDispatchMode):
    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "equal")

    def __init__(self, note):
        super().__init__()
        self.note = note

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in self.NAMES:
            self.note(name)
        if name == "_to_copy" and args[0].is_cuda and str((kwargs or {}).get("device")) == "cpu":
            self.note("copy to the host")
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def counting_host_reads(counts=lambda: True):
    """Yields a list that grows with each operation for whose result the host waits: `.item()`, `.tolist()`, `if t:`,
    `nonzero`, masks as indices; while `counts()` is true. On a CPU it counts what a GPU would wait for."""
    found: list[str] = []

    def note(name: str) -> None:
        if counts():
            found.append(name)

    def noting_tolist(tensor):  # on a CPU it dispatches nothing, on a GPU a copy, which is one and the same read
        note("tolist")
        with torch.utils._python_dispatch._disable_current_modes():
            return tolist(tensor)

    tolist = torch.Tensor.tolist
    torch.Tensor.tolist = noting_tolist
    try:
        with _Reads(note):
            yield found
    finally:
        torch.Tensor.tolist = tolist


def measure(options: argparse.Namespace, folder: str) -> dict:
    """The numbers of one run, as they are printed."""
    on_gpu = torch.cuda.is_available() and not options.cpu
    measuring = Measuring(max(options.steps, LEAST_PAIRS), on_gpu, options.profile)
    trainer = trainer_of(options, folder, measuring)
    with measuring.attached(trainer), contextlib.suppress(Enough):
        trainer.train()
    return summary(measuring, options)


def trainer_of(options: argparse.Namespace, folder: str, *callbacks: TrainerCallback) -> CPSTrainer:
    """A trainer on drawn scenes that runs until a callback ends it."""
    root = write_object_scenes(Path(folder) / "scenes", num_train=12, num_val=2, progress=False)
    scenes = load_voc(root, "train")
    settings = command_line.parse(Settings, []).with_values(
        output_dir=f"{folder}/run",
        max_steps=100_000,  # never reached
        per_device_train_batch_size=options.batch,
        crop_size=[options.crop, options.crop],
        dataloader_num_workers=options.workers,
        agreement_images=0,
        disable_tqdm=True,
        num_branches=1 if OBJECTIVES[options.objective].teacher else options.branches,
        **({"ema_decay": 0.996} if OBJECTIVES[options.objective].averages else {}) | options.settings,
    )
    return CPSTrainer(
        MODELS[options.model],
        **replace(settings, objective=objective_of(options)).for_trainer(),
        train_dataset=scenes,
        unlabeled_dataset=scenes,
        callbacks=callbacks,
    )


def objective_of(options: argparse.Namespace):
    kind, fields = OBJECTIVES[options.objective], dict(options.fields)
    if options.cutmix is not None:
        if not hasattr(kind, "cutmix"):
            sys.exit(f"--cutmix: {options.objective} has no CutMix; leave the option out.")
        fields["cutmix"] = type(kind.cutmix)(options.cutmix == "true")
    return kind(**fields)


def summary(measuring: Measuring, options: argparse.Namespace) -> dict:
    rows, on_gpu = measuring.rows[WARM_UP:], measuring.on_gpu
    apart = [row["parts"] for row in rows if "parts" in row]
    whole = [row for row in rows if "parts" not in row] if on_gpu else rows
    step, floor, loss = (statistics.median(row[key] for row in whole) for key in ("step", "floor", "loss alone"))
    parts = {name: statistics.median(one.get(name, 0.0) for one in apart) for name in ORDER}
    if on_gpu:
        optimizer = sum(parts[name] for name in OPTIMIZER)
        counted = [row["step"] - optimizer - loss for row in whole]
    else:
        counted = [row["step"] - sum(row["parts"].get(name, 0.0) for name in OPTIMIZER) for row in rows]
    streams = 2 if measuring.trainer.objective.views else 1
    return {
        "overhead": statistics.median(counted) / floor,
        "overhead_with_optimizer": step / floor,
        "loss_share": loss / step,
        "step_s": step,
        "floor_s": floor,
        "loss_s": loss,
        "parts_s": {name: seconds for name, seconds in parts.items() if seconds},
        "images_per_s": streams * options.batch / step,
        "peak_gib": max(row["peak"] for row in rows) / 2**30 if on_gpu else None,
        "memory_mib": {name: size / 2**20 for name, size in (measuring.memory | state_of(measuring.trainer)).items()},
        "passes": rows[-1]["passes"],
        "host_reads": len(measuring.host_reads),
        "host_reads_by": measuring.host_reads,
        "pairs": len(whole),
        "ratios": [one / row["floor"] for one, row in zip(counted, whole, strict=True)],
        "kernels": kernels(measuring.kernels, on_gpu) if measuring.kernels else None,
        "clock": "wall clock, device waited for" if on_gpu else "CPU time of the process",
        "settings": {
            k: getattr(options, k) for k in ("objective", "cutmix", "model", "branches", "batch", "crop", "threads")
        }
        | {**options.settings, **options.fields},
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "versions": versions(),
    }


def state_of(trainer: CPSTrainer) -> dict[str, int]:
    """Bytes that are allocated between steps."""
    states = [value for state in trainer.optimizer.state.values() for value in state.values()]
    return {
        "weights": sum(parameter.nbytes for parameter in trainer.module.parameters()),
        "optimizer": sum(value.nbytes for value in states if isinstance(value, torch.Tensor)),
    }


def kernels(profile: torch.profiler.profile, on_gpu: bool, most: int = 15) -> list[dict]:
    """One step's time by operation, longest first: milliseconds and calls."""
    key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    found = sorted(profile.key_averages(), key=lambda one: getattr(one, key), reverse=True)[:most]
    return [{"name": one.key[:90], "ms": getattr(one, key) / 1000, "calls": one.count} for one in found]


def table(found: dict) -> str:
    lines = [f"| {found['settings']['objective']}, {found['clock']} | s | share of the step |", "|---|---|---|"]
    for name, seconds in found["parts_s"].items():
        lines.append(f"| {name} | {seconds:.4f} | {100 * seconds / found['step_s']:.1f} % |")
    for name in ("step", "floor", "loss"):
        lines.append(f"| **{name}** | {found[f'{name}_s']:.4f} | {100 * found[f'{name}_s'] / found['step_s']:.1f} % |")
    ratios = sorted(found["ratios"])
    peak = f", peak {found['peak_gib']:.1f} GiB" if found["peak_gib"] else ""
    memory = found["memory_mib"]
    lines += [
        "",
        f"overhead {found['overhead']:.3f} (pairs {ratios[0]:.3f} to {ratios[-1]:.3f}), with the optimizer "
        f"{found['overhead_with_optimizer']:.3f}; {found['passes']} network passes and {found['host_reads']} host "
        f"read(s) a step; {found['images_per_s']:.1f} images/s{peak}; {found['pairs']} pairs; memory "
        f"{memory['step'] / memory['floor']:.3f} of the floor's {memory['floor']:.0f} MiB",
    ]
    lines += [f"{one['ms']:10.2f} ms {one['calls']:6} x {one['name']}" for one in found["kernels"] or ()]
    return "\n".join(lines)


def _gpu_clock() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--objective", choices=OBJECTIVES, default="cps")
    parser.add_argument("--cutmix", choices=("true", "false"), help="with or without; default: the objective's")
    parser.add_argument("--model", choices=MODELS, default="deeplabv3plus-r50", help="from random weights")
    parser.add_argument("--branches", type=int, default=2, help="how many networks")
    parser.add_argument("--batch", type=int, default=2, help="labeled images, and as many unlabeled ones")
    parser.add_argument("--crop", type=int, default=128, help="height and width in pixels")
    parser.add_argument(
        "--steps", type=int, default=7, help=f"pairs of step and floor; fewer than {LEAST_PAIRS} are not"
    )
    parser.add_argument("--threads", type=int, default=1, help="torch threads on the CPU")
    parser.add_argument("--workers", type=int, default=1, help="data workers per stream; 0: none")
    parser.add_argument("--settings", type=json.loads, default={}, help="fields of any group of settings, as JSON")
    parser.add_argument("--fields", type=json.loads, default={}, help="fields of the objective, as JSON")
    parser.add_argument("--profile", action="store_true", help="also list the operations that a step's time goes to")
    parser.add_argument("--cpu", action="store_true", help="measure on the CPU although there is a GPU")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout; the table goes to stderr")
    return parser.parse_args(argv)


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    logging.getLogger("cps_hf").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        found = measure(options, folder)
    print(table(found), file=sys.stderr if options.json else sys.stdout)
    if options.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
