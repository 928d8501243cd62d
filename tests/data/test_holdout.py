"""Which labeled images are held out: the share, every class on both sides, whole groups, independent of order."""

import random

import numpy as np
import pytest

from cps_hf.data.holdout import group_of, hold_out, suggested_groups


def some_set(seed, count=40, classes=8):
    """Ids, and classes of which the last ones are rare."""
    rng = np.random.default_rng(seed)
    holds = rng.random((count, classes)) < np.linspace(0.9, 0.05, classes)
    holds[:, 0] = True
    return [f"images/{i:03d}.jpg" for i in range(count)], holds


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("count", "share"), [(10, 0.2), (20, 0.2), (40, 0.2), (41, 0.5), (60, 0.1)])
def test_every_class_is_on_both_sides_if_possible(seed, count, share):
    ids, holds = some_set(seed, count)
    held = hold_out(ids, holds, share, seed=seed)
    assert len(held) == int(share * count + 0.5) and held == sorted(held)
    inside = np.array([name in held for name in ids])
    images, in_held, in_train = holds.sum(0), holds[inside].sum(0), holds[~inside].sum(0)
    assert (in_train[images > 0] > 0).all()  # training loses none
    for missing in np.flatnonzero((images > 1) & (in_held == 0)):
        last = holds[~inside] & (in_train == 1)  # per image, the classes that training would lose
        cannot = last[holds[~inside][:, missing]].any(1).all()
        assert cannot or len(held) <= (in_held > 0).sum()  # each held-out image added a class


def test_classes_with_one_image_are_trained_on():
    ids = [f"{i}" for i in range(20)]
    for seed in range(20):
        holds = np.zeros((20, 3), bool)
        holds[:, 0], holds[[3, 11], 1], holds[7, 2] = True, True, True
        held = hold_out(ids, holds, 0.2, seed=seed)
        assert len({"3", "11"} & {*held}) == 1 and "7" not in held and len(held) == 4


def test_a_new_class_is_held_out_before_many_known_ones():
    ids, holds = [f"{i}" for i in range(10)], np.zeros((10, 11), bool)
    holds[:7, :10], holds[7:, 10] = True, True  # seven images have ten classes each, three only the eleventh
    for seed in range(5):
        held = hold_out(ids, holds, 0.2, seed=seed)
        assert len(held) == 2 and holds[list(map(int, held))].any(0).all()


def test_a_common_class_keeps_its_share():
    ids = [f"{i}" for i in range(200)]
    holds = np.ones((200, 2), bool)
    holds[::2, 1] = False
    held = hold_out(ids, holds, 0.2, seed=3)
    assert len(held) == 40 and sum(int(name) % 2 for name in held) == 20


def test_the_split_depends_only_on_seed_and_names():
    ids, holds = some_set(1)
    first = hold_out(ids, holds, 0.2, seed=0)
    order = list(range(len(ids)))
    for shuffle in range(5):
        random.Random(shuffle).shuffle(order)
        assert hold_out([ids[i] for i in order], holds[order], 0.2, seed=0) == first
    equal = np.ones((40, 1), bool)
    drawn = {tuple(hold_out(ids, equal, 0.2, seed=seed)) for seed in range(10)}
    assert len(drawn) == 10
    few = hold_out(ids[:12], equal[:12], 0.25, seed=0)
    assert few == ["images/000.jpg", "images/006.jpg", "images/011.jpg"]  # on any machine, in any version


@pytest.mark.parametrize(
    ("count", "share", "held"),
    [(1, 0.2, 0), (4, 0.2, 0), (4, 0.5, 2), (5, 0.1, 1), (5, 0.2, 1), (5, 0.9, 4), (6, 0.99, 5)],
)
def test_at_least_one_of_five_images_is_held_out_and_never_all(count, share, held):
    assert len(hold_out([f"{i}" for i in range(count)], np.ones((count, 2), bool), share)) == held


def test_if_all_images_are_needed_the_least_costly_is_held_out():
    holds = np.eye(6, dtype=bool).repeat(2, 1)
    holds[3, 6] = False  # has a single class; the others have two
    assert hold_out([f"{i}" for i in range(6)], holds, 0.2) == ["3"]


@pytest.mark.parametrize("seed", range(10))
def test_a_group_is_held_out_as_a_whole_or_not_at_all(seed):
    ids, holds = some_set(seed)
    groups = [f"video {i % 7}" for i in range(len(ids))]
    held = {*hold_out(ids, holds, 0.2, groups=groups, seed=seed)}
    inside = {group for name, group in zip(ids, groups, strict=True) if name in held}
    assert held == {name for name, group in zip(ids, groups, strict=True) if group in inside}
    assert 5 <= len(held) <= 12 and 1 <= len(inside) <= 2


def test_large_groups_leave_training_images():
    ids, holds = [f"{i}" for i in range(10)], np.ones((10, 1), bool)
    assert hold_out(ids, holds, 0.2, groups=["a"] * 7 + ["b"] * 3) == ["7", "8", "9"]
    assert len(hold_out(ids, holds, 0.1, groups=["a"] * 5 + ["b"] * 5)) == 5
    with pytest.raises(ValueError, match="`group_by` finds a single group, 'a', in all 10 labeled images"):
        hold_out(ids, holds, 0.2, groups=["a"] * 10)
    for share in (0, 1, -0.5, float("nan")):
        with pytest.raises(ValueError, match="a share between 0 and 1"):
            hold_out(ids, holds, share)


def test_groups_are_the_pattern_matches_in_paths():
    paths = ["images/p1/a.jpg", "images/p2/a.jpg"]
    assert group_of(r"(p\d)", paths) == ["p1", "p2"] and group_of(r"p\d", paths) == ["p1", "p2"]
    assert group_of("(p1)", paths, strict=False) == ["p1", None]
    with pytest.raises(ValueError, match=r"matches 1 of 2 labeled images, but not images/p2/a\.jpg"):
        group_of("(p1)", paths)
    with pytest.raises(ValueError, match="`group_by` '\\(' is not a regular expression"):
        group_of("(", paths)


@pytest.mark.parametrize(
    ("paths", "groups"),
    [
        ([f"images/{video}_{n:05d}.jpg" for video in ("0001TP", "0016E5") for n in range(6)], ["0001TP", "0016E5"]),
        ([f"images/ride {video}/{n:05d}.jpg" for video in "ab" for n in range(6)], ["ride a", "ride b"]),
        ([f"images/{name}.jpg" for name in ("anna", "bert", "carl", "dora", "emil", "fred")], None),
        ([f"IMG_{n:04d}.jpg" for n in range(9)], None),  # one sequence, or one camera
        ([f"{name}_1.jpg" for name in ("anna", "bert", "carl", "dora", "emil", "fred")], None),
    ],
)
def test_frame_like_names_suggest_a_group_pattern(paths, groups):
    found = suggested_groups(paths)
    if groups is None:
        assert found is None
    else:
        pattern, names = found
        assert names == groups and sorted({*group_of(pattern, paths)}) == groups
