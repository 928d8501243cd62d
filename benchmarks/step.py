"""One optimizer step of `CPSTrainer` taken apart, beside its floor.

    python benchmarks/step.py --objective cps --cutmix true --model deeplabv3plus-r50 --batch 2 --crop 128 --steps 7

The floor is what no implementation of the method can leave out: the step's network passes, with the same networks on
the same tensors (those without gradient too), and the backward passes from `logits.float().mean()`. The step is the
trainer's own, from one `on_step_begin` to the next: waiting for data, transfer, forwards, loss, backward, the check of
numbers and norms, logging; the optimizer (with the teacher's update) is no part of the floor and is listed by itself.

    overhead = median(step - optimizer) / median(floor)

Steps and floors alternate in one process, at least 7 pairs after 2 that do not count. On a CPU what is measured is the
process's CPU time (data come from workers, as in training); on a GPU the wall clock, the device being waited for, and
`overhead` leaves out the loss, whose share of the step is listed. The loss is measured by itself once a pair: the
objective on the recorded logits, forward and backward. `host_reads` are transfers from the device that the host waits
for, counted over one optimizer step more.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
from transformers import TrainerCallback

import cps_hf.trainer
from cps_hf import OBJECTIVES, CPSConfig, CPSTrainer, batches
from cps_hf.assembly import versions
from cps_hf.data.scenes import write_object_scenes
from cps_hf.data.voc import load_voc

CONFIGS = Path(__file__).parents[1] / "examples/configs/models"
MODELS = {
    "deeplabv3plus-r50": "deeplabv3_plus_r50.json",
    "deeplabv3plus-r101": "deeplabv3_plus_r101.json",
    "hrnet-w48": "hrnet_w48.json",
    "dpt-dinov2-b": "dpt_dinov2_b.json",
    "upernet-swin-t": "upernet_swin_t.json",
}
WARM_UP, LEAST_PAIRS = 2, 7
OPTIMIZER = ("optimizer", "teacher")  # what changes weights
SUPERVISED, UNSUPERVISED, PSEUDO = "supervised forward", "unsupervised forward", "pseudo-label forwards"
ORDER = ("data wait", "transfer", "counts", PSEUDO, SUPERVISED, UNSUPERVISED, "loss", "backward", "check and clip")
ORDER += (*OPTIMIZER, "logging", "rest")


class Parts:
    """Time by part; what runs inside another part is not counted twice."""

    def __init__(self, clock):
        self.clock, self.spent, self.stack = clock, defaultdict(float), []
        self.since = clock()

    def enter(self, name: str) -> None:
        self._charge()
        self.stack.append(name)

    def leave(self) -> None:
        self._charge()
        self.stack.pop()

    def _charge(self) -> None:
        now = self.clock()
        self.spent[self.stack[-1] if self.stack else "rest"] += now - self.since
        self.since = now

    def take(self) -> dict[str, float]:
        """What was spent since the last time."""
        self._charge()
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
    """All pairs are measured: nothing is evaluated or saved."""


class Measuring(TrainerCallback):
    """Takes the trainer's parts apart, and runs the floor and the loss between two steps."""

    def __init__(self, pairs: int, clock):
        self.pairs, self.clock, self.parts = pairs, clock, Parts(clock)
        self.rows: list[dict] = []  # by pair: "step", "floor", "loss alone" and the parts, in seconds
        self.passes: list[tuple] = []  # of the newest step: branch, images, options, with gradient, logits
        self.arguments: list[tuple] = []  # of the newest step: the arguments of the training module
        self.host_reads = 0

    def attach(self, trainer: CPSTrainer) -> None:
        self.trainer, parts = trainer, self.parts
        trainer._fetch = parts.timed("data wait", trainer._fetch)
        batches.to_device = parts.timed("transfer", batches.to_device)
        batches.share_counts = parts.timed("counts", batches.share_counts)
        trainer.guard.judge = parts.timed("check and clip", trainer.guard.judge)
        trainer._log_evaluate_save = parts.timed("logging", trainer._log_evaluate_save)
        trainer.accelerator.backward = parts.timed("backward", trainer.accelerator.backward)
        for owner, name in ((trainer.optimizer, "step"), (trainer.optimizer, "zero_grad")):
            setattr(owner, name, parts.timed("optimizer", getattr(owner, name)))
        cps_hf.trainer.update_teacher = parts.timed("teacher", cps_hf.trainer.update_teacher)
        trainer.module.register_forward_pre_hook(self._before_module)
        trainer.module.register_forward_hook(lambda *_: parts.leave())
        for network in self._networks():
            network.register_forward_pre_hook(self._before_network)
            network.register_forward_hook(self._after_network, with_kwargs=True)

    def _networks(self):
        teacher = self.trainer.module.teacher
        return [*self.trainer.module.branches, *([teacher] if teacher is not None else [])]

    def _before_module(self, module, args) -> None:
        self.parts.enter("loss")
        self.arguments.append(args)

    def _before_network(self, network, args) -> None:
        with_gradient = torch.is_grad_enabled()
        seen = any(one is network and gradient for one, _, _, gradient, _ in self.passes)
        self.parts.enter(PSEUDO if not with_gradient else UNSUPERVISED if seen else SUPERVISED)

    def _after_network(self, network, args, options, logits) -> None:
        self.parts.leave()
        self.passes.append((network, args[0], options, torch.is_grad_enabled(), logits.detach()))

    def on_step_begin(self, args, state, control, **kwargs):
        """One step has ended, with its logging: now its floor."""
        parts = self.parts.take()
        if len(self.rows) == WARM_UP + self.pairs:  # this one was for its host reads
            self.reads.__exit__(None, None, None)
            raise Enough
        if self.passes:
            passes = self.passes
            row = {"step": sum(parts.values()), "parts": parts, "passes": len(passes)}
            row["floor"], row["loss alone"] = self.floor(passes), self.loss_alone(passes, self.arguments)
            self.rows.append(row)
            if len(self.rows) == WARM_UP + self.pairs:
                self.reads = counting_host_reads(lambda: self.parts.stack[-1:] != ["data wait"])
                self.host_reads = self.reads.__enter__()
        self.passes, self.arguments = [], []
        self.parts.take()

    @contextlib.contextmanager
    def aside(self):
        """What happens here is no part of the training: hooks off, gradients and random numbers as before."""
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
        with self.aside():
            start = self.clock()
            means = []
            with self.trainer.accelerator.autocast():
                for network, images, options, with_gradient, _ in passes:
                    with torch.set_grad_enabled(with_gradient):
                        mean = network(images, **options | {"resize": False}).float().mean()
                    if with_gradient:
                        means.append(mean)
            sum(means).backward()
            return self.clock() - start

    def loss_alone(self, passes, arguments) -> float:
        """Forward and backward of the objective where the networks cost nothing: they give the recorded logits."""
        left = [(network, logits.requires_grad_(gradient)) for network, _, _, gradient, logits in passes]

        def replay(network):
            def forward(*args, **options):
                index = next(i for i, (one, _) in enumerate(left) if one is network)
                return left.pop(index)[1]

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

    def noting_tolist(tensor):  # on a CPU it dispatches nothing
        note("tolist")
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
    clock = _gpu_clock if on_gpu else time.process_time
    pairs = max(options.steps, LEAST_PAIRS)
    measuring = Measuring(pairs, clock)
    root = write_object_scenes(Path(folder) / "scenes", num_train=12, num_val=2, progress=False)
    scenes = load_voc(root, "train")
    args = CPSConfig(
        output_dir=f"{folder}/run",
        max_steps=100_000,  # never reached
        per_device_train_batch_size=options.batch,
        crop_size=[options.crop, options.crop],
        dataloader_num_workers=options.workers,
        agreement_images=0,
        disable_tqdm=True,
        num_branches=1 if OBJECTIVES[options.objective].teacher else options.branches,
        **options.settings,
    )
    trainer = CPSTrainer(
        str(CONFIGS / MODELS[options.model]),
        args,
        objective=objective_of(options),
        train_dataset=scenes,
        unlabeled_dataset=scenes,
        callbacks=[measuring],
    )
    measuring.attach(trainer)
    with contextlib.suppress(Enough):
        trainer.train()
    return summary(measuring, options, on_gpu)


def objective_of(options: argparse.Namespace):
    kind, fields = OBJECTIVES[options.objective], dict(options.fields)
    if options.cutmix is not None:
        if not hasattr(kind, "cutmix"):
            sys.exit(f"--cutmix: {options.objective} has no CutMix; leave the option out.")
        fields["cutmix"] = type(kind.cutmix)(options.cutmix == "true")
    return kind(**fields)


def summary(measuring: Measuring, options: argparse.Namespace, on_gpu: bool) -> dict:
    rows = measuring.rows[WARM_UP:]
    median = {key: statistics.median(row[key] for row in rows) for key in ("step", "floor", "loss alone")}
    parts = {name: statistics.median(row["parts"].get(name, 0.0) for row in rows) for name in ORDER}
    counted = [row["step"] - sum(row["parts"].get(name, 0.0) for name in OPTIMIZER) for row in rows]
    without_optimizer = statistics.median(counted)
    if on_gpu:
        without_optimizer -= median["loss alone"]
    return {
        "overhead": without_optimizer / median["floor"],
        "overhead_with_optimizer": median["step"] / median["floor"],
        "loss_share": median["loss alone"] / median["step"],
        "step_s": median["step"],
        "floor_s": median["floor"],
        "loss_s": median["loss alone"],
        "parts_s": {name: seconds for name, seconds in parts.items() if seconds},
        "passes": rows[-1]["passes"],
        "host_reads": len(measuring.host_reads),
        "pairs": len(rows),
        "ratios": [one / row["floor"] for one, row in zip(counted, rows, strict=True)],
        "clock": "wall clock, device waited for" if on_gpu else "CPU time of the process",
        "settings": {
            k: getattr(options, k) for k in ("objective", "cutmix", "model", "branches", "batch", "crop", "threads")
        }
        | {**options.settings, **options.fields},
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "versions": versions(),
    }


def table(found: dict) -> str:
    lines = [f"| {found['settings']['objective']}, {found['clock']} | s | share of the step |", "|---|---|---|"]
    for name, seconds in found["parts_s"].items():
        lines.append(f"| {name} | {seconds:.4f} | {100 * seconds / found['step_s']:.1f} % |")
    for name in ("step", "floor", "loss"):
        lines.append(f"| **{name}** | {found[f'{name}_s']:.4f} | {100 * found[f'{name}_s'] / found['step_s']:.1f} % |")
    ratios = sorted(found["ratios"])
    lines += [
        "",
        f"overhead {found['overhead']:.3f} (pairs {ratios[0]:.3f} to {ratios[-1]:.3f}), with the optimizer "
        f"{found['overhead_with_optimizer']:.3f}; {found['passes']} network passes and {found['host_reads']} host "
        f"read(s) a step; {found['pairs']} pairs",
    ]
    return "\n".join(lines)


def _gpu_clock() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--objective", choices=OBJECTIVES, default="cps")
    parser.add_argument("--cutmix", choices=("true", "false"), help="with or without; none: the objective's default")
    parser.add_argument("--model", choices=MODELS, default="deeplabv3plus-r50", help="from random weights")
    parser.add_argument("--branches", type=int, default=2, help="how many networks")
    parser.add_argument("--batch", type=int, default=2, help="labeled images, and as many unlabeled ones")
    parser.add_argument("--crop", type=int, default=128, help="height and width in pixels")
    parser.add_argument(
        "--steps", type=int, default=7, help=f"pairs of step and floor; fewer than {LEAST_PAIRS} are not"
    )
    parser.add_argument("--threads", type=int, default=1, help="of torch, on the CPU")
    parser.add_argument("--workers", type=int, default=1, help="processes a stream that prepare data; 0: none")
    parser.add_argument("--settings", type=json.loads, default={}, help="fields of CPSConfig, as JSON")
    parser.add_argument("--fields", type=json.loads, default={}, help="fields of the objective, as JSON")
    parser.add_argument("--cpu", action="store_true", help="measure on the CPU although there is a GPU")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout; the table goes to stderr")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.getLogger("cps_hf").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        found = measure(options, folder)
    print(table(found), file=sys.stderr if options.json else sys.stdout)
    if options.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
