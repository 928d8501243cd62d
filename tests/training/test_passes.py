"""The cost of a step, measured: network passes by hooks, host reads, and unused computation."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from support.by_hand import batches, mapped
from support.toy import settings, tiny_upernet, toy_models, write_world
from transformers import TrainerCallback

from cps_hf.modeling.branches import Branch, build_branches
from cps_hf.objectives import OBJECTIVES, CrossProbabilityConsistency, CrossPseudoSupervision, MeanTeacher
from cps_hf.training.labelers import Labeler
from cps_hf.training.module import TrainingModule
from cps_hf.training.trainer import CPSTrainer

VIEWS = ("weak", "strong", "strong_2", "cutmix_mask", "cutmix_mask_2", "pseudo_labels")
METHODS = {
    "supervised": OBJECTIVES["supervised"](),
    "cps": CrossPseudoSupervision(cutmix=False),
    "cps + cutmix": CrossPseudoSupervision(),
    "cps_averaged": OBJECTIVES["cps_averaged"](confidence_threshold=0.4, complementary_dropout=0.0),
    "cpc": CrossProbabilityConsistency(),
    "cpc + cutmix": CrossProbabilityConsistency(cutmix=True),
    "mean_teacher": MeanTeacher(confidence_threshold=0.4),
    "mean_teacher, jitter": MeanTeacher(perturbation="jitter", confidence_threshold=0.4),
    "mean_teacher, noise": MeanTeacher(perturbation="noise", confidence_threshold=0.4),
    "pseudoseg": OBJECTIVES["pseudoseg"](),
    "fixmatch": OBJECTIVES["fixmatch"](confidence_threshold=0.4),
    "unimatch": OBJECTIVES["unimatch"](confidence_threshold=0.4, feature_dropout=0.0),
    "unimatch_v2": OBJECTIVES["unimatch_v2"](confidence_threshold=0.4, complementary_dropout=0.0),
    "fixed_teacher": OBJECTIVES["fixed_teacher"](labelers=["a"], confidence_threshold=0.4),
    "fixed_teacher, soft": OBJECTIVES["fixed_teacher"](labelers=["a"], soft=True, flip=False),
    "fixed_teacher, labeled before": OBJECTIVES["fixed_teacher"](),
}
# Passes of one branch: (images in each pass with gradient), (in each pass without); L: labeled, U: unlabeled images.
L, U = 2, 4
PASSES = {
    "supervised": ([L], []),
    "cps": ([L, U], []),
    "cps + cutmix": ([L, U], [U]),
    "cps_averaged": ([L, 2 * U], [U]),  # those without gradient are the average's
    "cpc": ([L, U], []),
    "cpc + cutmix": ([L, U], [U]),
    "mean_teacher": ([L, U], [U]),  # those without gradient are the teacher's
    "mean_teacher, jitter": ([L, U], [U]),
    "mean_teacher, noise": ([L, U], [U]),
    "pseudoseg": ([L, U], [U]),
    "fixmatch": ([L, U], [U]),
    "unimatch": ([L, U, U, U], [U]),
    "unimatch_v2": ([L, 2 * U], [U]),
    "fixed_teacher": ([L, U], [U, U]),  # those without gradient are the labeler's
    "fixed_teacher, soft": ([L, U], [U]),
    "fixed_teacher, labeled before": ([L, U], []),
}
JOINT = {name: ([L + U], without) for name, (_, without) in PASSES.items() if name != "supervised"}
JOINT |= {"unimatch": ([U, L + 2 * U], [U]), "unimatch_v2": ([L + 2 * U], [U]), "cps_averaged": ([L + 2 * U], [U])}


def module_of(objective, models=None):
    models = toy_models(1 if objective.teacher else 2) if models is None else models
    labelers = [Labeler(Branch(model), "a") for model in toy_models(1, seed=20) if objective.labelers]
    return TrainingModule(models, objective, averages=objective.averages, labelers=labelers).train()


def step(module, height=32, width=32):
    """One call on images large enough for a network."""
    labeled, unlabeled = batches(VIEWS, L, U)
    torch.manual_seed(0)
    large = [mapped(batch, lambda value: grown(value, height, width)) for batch in (labeled, unlabeled)]
    return module(*large, torch.tensor(1.0))


def grown(value, height, width):
    """Each pixel as a block."""
    rows, columns = (torch.arange(n) * value.shape[d] // n for n, d in ((height, -2), (width, -1)))
    return value[..., rows, :][..., columns]


def passes_of(objective):
    found = ([], [])
    module = module_of(objective)
    networks = module.networks()
    networks = [networks[name] for name in ("branch_0", "branch_0_average", "teacher") if name in networks]
    for network in (*networks, *(labeler.branch for labeler in module.labelers)):
        network.model.register_forward_hook(
            lambda _, args, kwargs, out: found[not torch.is_grad_enabled()].append(len(kwargs["pixel_values"])),
            with_kwargs=True,
        )
    step(module).loss.backward()
    return tuple(map(sorted, found))


@pytest.mark.parametrize("name", METHODS)
def test_a_step_takes_the_passes_of_the_formula_and_no_more(name):
    assert passes_of(METHODS[name]) == PASSES[name]


@pytest.mark.parametrize("name", JOINT)
def test_labeled_and_unlabeled_images_can_share_a_pass(name):
    joint = type(METHODS[name])(**vars(METHODS[name]) | {"joint_forward": True})
    assert passes_of(joint) == JOINT[name]
    one, other = (step(module_of(objective)) for objective in (METHODS[name], joint))
    torch.testing.assert_close(one.loss, other.loss)  # these networks have no norm layers


def test_a_method_without_unlabeled_images_cannot_join_them():
    with pytest.raises(ValueError, match="`joint_forward`.*no unlabeled"):
        OBJECTIVES["supervised"](joint_forward=True)


def test_a_shared_pass_changes_batch_norms_statistics():
    losses = []
    for joint in (False, True):
        models = build_branches(tiny_upernet(), seed=1)
        losses.append(step(module_of(CrossPseudoSupervision(joint_forward=joint), models), 64, 64).loss)
    assert (losses[0] - losses[1]).abs() > 1e-4


@pytest.mark.parametrize("name", METHODS)
def test_the_losses_are_those_of_full_size_logits(name):
    """The losses of a method on strided logits, and on branches that resize, as a user's callables do."""
    lean, plain = module_of(METHODS[name]), module_of(METHODS[name])
    objective, branches, teacher = plain.objective, [*plain.branches], plain.teacher
    averages = {"averages": [*plain.averages]} if objective.averages else {}
    averages |= {"labelers": [lambda x: plain.labelers[0](x).resized()]} if objective.labelers else {}
    plain.forward = lambda labeled, unlabeled, progress: objective(
        [lambda x, b=b, **options: b(x, **options) for b in branches],
        labeled,
        unlabeled,
        teacher=teacher and (lambda x: teacher(x)),
        progress=progress,
        **averages,
    )
    ours, reference = step(lean), step(plain)
    torch.testing.assert_close(ours.loss, reference.loss, rtol=1e-5, atol=1e-6)
    for key, value in reference.logs.items():
        torch.testing.assert_close(ours.logs[key].float(), value.float(), rtol=1e-5, atol=1e-6)
    ours.loss.backward()
    reference.loss.backward()
    for (key, one), other in zip(lean.named_parameters(), plain.parameters(), strict=True):
        if one.requires_grad:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.parametrize(
    ("fields", "passes"),
    [
        ({"per_device_eval_batch_size": 1}, [1, 1, 1, 1, 1]),
        ({"per_device_eval_batch_size": 2}, [2, 2, 1]),
        ({"per_device_eval_batch_size": 4}, [4, 1]),
        # 2 x 2 windows per image; those of the batch that start in the same row are one pass
        ({"per_device_eval_batch_size": 1, "eval_mode": "sliding"}, [1] * 20),
        ({"per_device_eval_batch_size": 4, "eval_mode": "sliding"}, [4, 4, 4, 4, 2, 2]),
    ],
)
def test_evaluation_passes_have_the_configured_batch_size(tmp_path, fields, passes):
    world = write_world(tmp_path / "world", [(48, 48)] * 5)
    args = settings(output_dir=str(tmp_path), crop_size=[32, 32], num_pictures=0, disable_tqdm=True, **fields)
    trainer = CPSTrainer(toy_models(1), **args, objective=METHODS["supervised"], train_dataset=world)
    seen = []
    trainer.models[0].backbone.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    trainer.evaluator.scores(world)
    assert seen == passes


class Reads(TrainerCallback):
    """Counts host reads from the beginning of one step to the next."""

    def __init__(self):
        script = Path(__file__).parents[2] / "benchmarks" / "step.py"
        if str(script.parent) not in sys.path:  # the script imports a file next to it
            sys.path.insert(0, str(script.parent))
        spec = importlib.util.spec_from_file_location("step_benchmark", script)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self.counting, self.found, self.open = module.counting_host_reads, [], None

    def on_step_begin(self, args, state, control, **kwargs):
        if self.open is not None:
            self.open.__exit__(None, None, None)
        self.open = self.counting(lambda: not self.fetching)
        self.found.append(self.open.__enter__())

    fetching = False


@pytest.mark.parametrize("name", ["cps + cutmix", "mean_teacher", "unimatch"])
def test_the_host_reads_the_device_once_per_optimizer_step(tmp_path, name):
    """Also in steps that log and clip. The data loader's reads on the host do not count."""
    reads = Reads()
    world = [write_world(tmp_path / kind, [(40, 56)] * 4) for kind in ("labeled", "unlabeled")]
    args = settings(
        output_dir=str(tmp_path / "out"),
        max_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        crop_size=[32, 40],
        logging_steps=1,
        max_grad_norm=1.0,
        dataloader_num_workers=0,
        agreement_images=0,
        num_pictures=0,
        disable_tqdm=True,
    )
    trainer = CPSTrainer(
        toy_models(1 if METHODS[name].teacher else 2),
        **args,
        objective=METHODS[name],
        train_dataset=world[0],
        unlabeled_dataset=world[1],
        callbacks=[reads],
    )
    fetch = trainer._fetch

    def fetching(*streams):
        reads.fetching = True
        try:
            return fetch(*streams)
        finally:
            reads.fetching = False

    trainer._fetch = fetching
    try:
        trainer.train()
    finally:
        reads.open.__exit__(None, None, None)
    assert reads.found[1] == ["tolist"] and reads.found[2] == ["tolist"]  # the last step evaluates and saves
