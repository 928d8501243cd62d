"""The choices for a data set and a machine, their reasons, and that given settings are never changed."""

import dataclasses

import pytest
from support.architectures import UNIVERSAL

from cps_hf.config import AugmentationConfig, CPSConfig, EvaluationConfig, ModelConfig
from cps_hf.modeling.around import architecture_around
from cps_hf.modeling.offline_backbone import SOURCE
from cps_hf.objectives import OBJECTIVES
from cps_hf.planning import FIRST_STAGE_SHARE, LABELED, RECOMMENDED, DataFacts, Machine, Timings, make_plan
from cps_hf.planning.plan import FEWEST_STEPS, MOST_STEPS

STREETS = DataFacts(
    num_labeled=20,
    num_unlabeled=300,
    num_evaluation=20,
    height=180,
    width=240,
    largest=(180, 240),
    class_shares={"road": 0.4, "pole": 0.01, "sky": 0.59},
)
CPU = Machine(cores=2, backbone=SOURCE)
GPU = Machine(device="cuda", name="a GPU", memory=80, bf16=True, cores=16, backbone=SOURCE)
TIMINGS = Timings(first_stage=0.5, second_stage=1.0, evaluation=2.0, start=8.0, end=12.0, spent=10.0)


def values(facts=STREETS, machine=CPU, given=None, **options):
    return make_plan(facts, machine, given or {}, **options).values()


def groups(chosen):
    """The groups of these settings, which validate them."""
    objective = OBJECTIVES[chosen.get("objective", "cps")]
    left = {name: value for name, value in chosen.items() if name != "objective"}
    made = []
    for cls in (CPSConfig, AugmentationConfig, ModelConfig, EvaluationConfig, objective):
        own = {f.name for f in dataclasses.fields(cls)} & left.keys()
        made.append(cls(**{name: left.pop(name) for name in own}))
    assert not left, f"no group has {left}"
    return made


@pytest.mark.parametrize("machine", [CPU, GPU, Machine(device="cuda", memory=5.0, cores=1, backbone=SOURCE)])
@pytest.mark.parametrize("num_unlabeled", [0, 300, None])
def test_every_plan_has_valid_and_consistent_settings(machine, num_unlabeled):
    plan = make_plan(dataclasses.replace(STREETS, num_unlabeled=num_unlabeled), machine, {})
    groups(plan.values())
    assert all(choice.reason for choice in plan.choices)
    table = plan.table()
    assert all(choice.name in table for choice in plan.choices) and max(map(len, table.splitlines())) <= 118


def test_photographs_with_few_labels_get_the_recommended_settings():
    chosen = groups(values())
    held = {name: getattr(group, name) for group in chosen for name in vars(group) if name in RECOMMENDED}
    assert held == {name: value for name, value in RECOMMENDED.items() if name != "objective"}


def test_the_method_follows_from_the_unlabeled_images():
    assert values()["objective"] == "cps"
    alone = values(dataclasses.replace(STREETS, num_unlabeled=0))
    assert alone["objective"] == "supervised" and alone["num_branches"] == 1
    assert not alone.keys() & {"pretrain_steps", "second_stage_learning_rate_factor", "weight", "cutmix"}


def test_the_first_stage_has_its_share_of_the_steps():
    chosen = values()
    assert chosen["pretrain_steps"] == round(FIRST_STAGE_SHARE * chosen["max_steps"])
    for none in (None, 0):  # CPS from the start
        one_stage = values(given={"pretrain_steps": none})
        groups(one_stage | {"pretrain_steps": none})
        assert "second_stage_learning_rate_factor" not in one_stage
    assert values(given={"max_steps": 300})["pretrain_steps"] == round(FIRST_STAGE_SHARE * 300)


def test_the_steps_fit_the_time_by_measurement():
    seen = []

    def measure(settings):
        seen.append(settings)
        return TIMINGS

    chosen = values(given={"crop_size": [96, 96]}, seconds=600, measure=measure)
    assert seen[0]["crop_size"] == [96, 96] and seen[0]["objective"] == "cps"
    assert not seen[0].keys() & {"max_steps", "pretrain_steps"}
    steps, first = chosen["max_steps"], chosen["pretrain_steps"]
    evaluations = steps // chosen["eval_steps"] + 2
    taken = first * 0.5 + (steps - first) * 1.0 + evaluations * 2.0 + 20 + 10
    assert 0.88 * 600 < taken < 600


@pytest.mark.parametrize(
    "given",
    [{"pretrain_steps": 20}, {"pretrain_steps": 300}, {"eval_steps": 5}, {"eval_steps": 5, "pretrain_steps": 9}],
)
def test_steps_fit_with_a_given_supervised_stage_or_evaluations(given):
    chosen = given | values(given=given, seconds=600, measure=lambda settings: TIMINGS)
    steps, first = chosen["max_steps"], chosen["pretrain_steps"]
    evaluations = steps // chosen["eval_steps"] + 2
    taken = first * 0.5 + (steps - first) * 1.0 + evaluations * 2.0 + 20 + 10
    assert 0.88 * 600 < taken < 600


def test_a_single_step_has_one_stage():
    given = {"max_steps": 1}
    assert groups(given | values(given=given))[0].pretrain_steps is None


def test_slow_evaluations_are_few():
    slow = dataclasses.replace(TIMINGS, evaluation=40.0)
    chosen = values(seconds=600, measure=lambda settings: slow)
    assert chosen["max_steps"] / chosen["eval_steps"] <= 2


def test_the_evaluation_between_the_stages_is_part_of_the_time():
    slow = dataclasses.replace(TIMINGS, evaluation=60.0)
    chosen = values(seconds=600, measure=lambda settings: slow)
    steps, first = chosen["max_steps"], chosen["pretrain_steps"]
    assert 0.88 * 600 < first * 0.5 + (steps - first) * 1.0 + 3 * 60 + 20 + 10 < 600


def test_a_time_that_is_too_short_says_how_much_is_needed():
    with pytest.raises(ValueError, match="fewer than 60 teach nothing. Give at least (\\d+) s") as error:
        values(seconds=50, measure=lambda settings: TIMINGS)
    needed = int(str(error.value).split("at least ")[1].split()[0])
    assert values(seconds=needed, measure=lambda settings: TIMINGS)["max_steps"] >= FEWEST_STEPS
    with pytest.raises(ValueError, match="fewer than"):
        values(seconds=needed - 15, measure=lambda settings: TIMINGS)


def test_a_long_time_is_not_filled_completely():
    assert values(seconds=1e6, measure=lambda settings: TIMINGS)["max_steps"] == MOST_STEPS


def test_given_settings_are_not_planned_or_measured():
    whole = values()
    for name in whole:
        assert name not in values(given={name: whole[name]})

    def measure(settings):
        raise AssertionError("not to be called")

    assert "max_steps" not in values(given={"max_steps": 10}, seconds=100, measure=measure)


def test_given_settings_are_not_contradicted():
    groups(values(given={"random_scale": [0.5, 1.0, 1.5]}) | {"random_scale": [0.5, 1.0, 1.5]})
    groups(values(given={"eval_stride": [32, 32]}) | {"eval_stride": [32, 32]})
    sgd = values(given={"optim": "sgd"})
    assert not sgd.keys() & {"learning_rate", "head_learning_rate_factor", "weight_decay"}
    other = values(given={"objective": "fixmatch"})
    groups(other | {"objective": "fixmatch"})
    assert other["pretrain_steps"] and "cutmix" not in other


def test_equally_frequent_classes_are_not_weighted():
    assert values()["class_weights"] == 0.5
    even = dataclasses.replace(STREETS, class_shares={"a": 0.4, "b": 0.6})
    assert values(even)["class_weights"] is None
    absent = dataclasses.replace(STREETS, class_shares={"a": 0.4, "b": 0.6, "never seen": 0.0})
    assert values(absent)["class_weights"] is None


@pytest.mark.parametrize("size, crop", [((100, 100), [96, 96]), ((20, 400), [32, 160]), ((180, 240), [160, 160])])
def test_crops_fit_the_images(size, crop):
    facts = dataclasses.replace(STREETS, height=size[0], width=size[1], largest=size)
    assert values(facts)["crop_size"] == crop


def test_a_gpu_gets_larger_crops_batches_by_memory_and_its_precision():
    facts = dataclasses.replace(STREETS, height=1000, width=2000, largest=(1000, 2000))
    chosen = values(facts, GPU)
    assert chosen["crop_size"] == [512, 512] and chosen["per_device_train_batch_size"] == 8
    assert chosen["mixed_precision"] == "bf16" and chosen["channels_last"] and chosen["auto_find_batch_size"]
    small = values(facts, dataclasses.replace(GPU, memory=10.0))
    assert small["per_device_train_batch_size"] == 4
    assert values(facts, dataclasses.replace(GPU, memory=5.0, bf16=False))["per_device_train_batch_size"] == 2
    assert "mixed_precision" not in values(facts, dataclasses.replace(GPU, bf16=False))


@pytest.mark.parametrize(
    "machine, side, shrink, crop",
    [(CPU, 180, 1, 160), (CPU, 288, 1, 160), (CPU, 480, 2, 160), (CPU, 1080, 4, 160), (CPU, 3000, 11, 160)]
    + [(GPU, 1080, 1, 512), (GPU, 3000, 3, 512)],
)
def test_large_photographs_are_shrunk_in_training_and_evaluation(machine, side, shrink, crop):
    facts = dataclasses.replace(STREETS, height=side, width=2 * side, largest=(side, 2 * side))
    chosen = values(facts, machine)
    groups(chosen)
    assert chosen.get("eval_shrink", 1) == shrink and chosen["crop_size"] == [crop, crop]
    assert chosen["random_scale"] == pytest.approx([scale / shrink for scale in LABELED["random_scale"]], rel=1e-2)
    assert chosen["eval_mode"] == "whole"


def test_scans_are_trained_and_evaluated_at_their_own_size():
    facts = dataclasses.replace(STREETS, height=20_000, width=20_000, largest=(20_000, 20_000))
    chosen = values(facts, CPU)
    groups(chosen)
    assert "eval_shrink" not in chosen and chosen["crop_size"] == [160, 160] and chosen["eval_mode"] == "sliding"
    assert chosen["random_scale"] == LABELED["random_scale"]


def test_given_scales_windows_or_networks_prevent_shrinking():
    facts = dataclasses.replace(STREETS, height=1080, width=1920, largest=(1080, 1920))
    for given in (
        {"random_scale": [0.5, 1.0]},
        {"eval_stride": [32, 32]},
        {"eval_mode": "sliding"},
        {"models": ["x"]},
    ):
        assert "eval_shrink" not in values(facts, CPU, given)
    chosen = values(facts, CPU, {"eval_shrink": 2})
    assert (
        chosen["random_scale"] == pytest.approx([s / 2 for s in LABELED["random_scale"]])
        and "eval_shrink" not in chosen
    )


def test_images_too_large_for_one_pass_are_evaluated_in_windows():
    facts = dataclasses.replace(STREETS, height=4000, width=6000, largest=(4000, 6000))
    assert values(facts, GPU, {"models": ["x"]})["eval_mode"] == "sliding"
    assert values()["eval_mode"] == "whole"


def test_gray_images_get_no_grayscale_augmentation():
    assert values(dataclasses.replace(STREETS, grey=True))["grayscale"] == 0.0
    assert "grayscale" not in values()


def test_norms_are_frozen_if_the_backbone_has_batch_norms():
    assert values()["freeze_norms"] is True
    assert "freeze_norms" not in values(given={"backbone": "convnext_atto"})  # layer norms
    assert "freeze_norms" not in values(given={"models": ["someone/model"]})
    network = architecture_around("resnet18").config
    plan = make_plan(STREETS, CPU, {"models": ["config.json"]}, network=network)
    assert plan.values()["freeze_norms"] is True and "backbone" not in plan.values()


@pytest.mark.parametrize("kind", UNIVERSAL, ids=lambda kind: kind.model_type)
def test_the_network_may_be_a_mask_classification_model(kind):
    plan = make_plan(STREETS, CPU, {"models": ["config.json"]}, network=kind.config())
    assert "freeze_norms" not in plan.values()  # layer norms


def test_a_run_of_one_step_has_one_stage():
    chosen = values(given={"max_steps": 1})
    groups(chosen | {"max_steps": 1})  # a factor of a second stage that does not exist would raise
    assert not chosen.keys() & {"pretrain_steps", "second_stage_learning_rate_factor"}


def test_without_a_pretrained_backbone_the_plan_gives_advice():
    plan = make_plan(STREETS, dataclasses.replace(CPU, backbone=None), {})
    assert "backbone" not in plan.values() and not plan.values().get("freeze_norms")
    assert "random weights" in plan.table() and "offline-backbone" in plan.table() and "20 labeled" in plan.table()
    many = make_plan(dataclasses.replace(STREETS, num_labeled=5000), dataclasses.replace(CPU, backbone=None), {})
    assert "random weights" in many.table() and "few" not in many.table()
    assert not make_plan(STREETS, CPU, {}).notes


def test_a_licence_with_conditions_is_in_the_plan_and_none_is_chosen_today():
    name = "timm/convnext_tiny.dinov3_lvd1689m"
    plan = make_plan(STREETS, dataclasses.replace(GPU, backbone=name), {})
    assert [note for note in plan.notes if "DINOv3 License" in note and name in note]
    given = make_plan(STREETS, GPU, {"backbone": name})  # logged where the weights are loaded
    assert not [note for note in given.notes if "licence" in note]
    assert not [note for note in make_plan(STREETS, GPU, {}).notes if "licence" in note]
