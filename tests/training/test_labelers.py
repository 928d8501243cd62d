"""Trained networks that make labels during training: their input, that they never change, and invalid ones."""

import json
import shutil

import pytest
import torch
from PIL import Image as PILImage
from safetensors.torch import load_file
from support.processes import launch
from support.resume_cases import Case, differences, make_trainer, without_cards_and_pictures, write_resume_world
from support.toy import ID2LABEL, MEAN, NAMES, STD, SUPPORT, predict_by_hand, tiny_branch
from transformers import AutoImageProcessor, MobileViTImageProcessor

from cps_hf.commands import parser
from cps_hf.commands.settings import Settings
from cps_hf.data.labels import LabelEncoding
from cps_hf.data.transforms import normalize
from cps_hf.hub.card import render_card
from cps_hf.inference.windows import predict
from cps_hf.objectives import FixedTeacher
from cps_hf.training.labelers import load_labelers
from cps_hf.training.results import card_facts

CASE = Case("fixed_teacher", "map", workers=0, processes=1)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = write_resume_world(tmp_path_factory.mktemp("resume"))
    for index in (0, 1):
        tiny_branch(root / "run" / f"branch_{index}", 3, seed=index, names=NAMES, scale=0.2)
    return root


def pair(root):
    return [str(root / "run" / f"branch_{index}") for index in (0, 1)]


def trainer_of(root, out, labelers, *, method=None, **fields):
    objective = FixedTeacher(labelers=labelers, **(method or {}))
    return make_trainer(root, CASE, out, objective=objective, **{"max_steps": 3, **fields})


def load(sources, **options):
    usual = {"id2label": ID2LABEL, "image_mean": MEAN, "image_std": STD, "crop_size": (40, 56)}
    return load_labelers(sources, **{**usual, "device": torch.device("cpu"), **options})


# ------------------------------------------------------------------------------------------------ their input


@pytest.mark.parametrize("own", [(MEAN, STD), ([0.5, 0.4, 0.3], [0.2, 0.25, 0.5])], ids=["the run's", "its own"])
def test_a_labeler_predicts_what_transformers_predicts(root, tmp_path, own):
    """Whatever the run's normalisation is."""
    folder = shutil.copytree(root / "run" / "branch_0", tmp_path / "branch_0")
    processor = AutoImageProcessor.from_pretrained(folder)
    processor.image_mean, processor.image_std = map(list, own)
    processor.save_pretrained(folder)
    path = next((root / "eval_images").glob("0.png"))
    image = pixels_of(path)
    [labeler] = load([str(folder)], crop_size=image.shape[-2:])
    said = labeler(normalize(image, torch.tensor(MEAN), torch.tensor(STD))).resized()
    torch.testing.assert_close(said, predict_by_hand(folder)(path), rtol=1e-3, atol=1e-3)
    assert (labeler.factor is None) == (own == (MEAN, STD))


def test_a_labeler_trained_on_swapped_colours_gets_them_swapped(root, tmp_path):
    folder = shutil.copytree(root / "run" / "branch_0", tmp_path / "branch_0")
    off = {"do_resize": False, "do_center_crop": False}
    MobileViTImageProcessor(**off, do_flip_channel_order=True).save_pretrained(folder)
    path = next((root / "eval_images").glob("0.png"))
    [labeler] = load([str(folder)], crop_size=pixels_of(path).shape[-2:])
    said = labeler(normalize(pixels_of(path), torch.tensor(MEAN), torch.tensor(STD))).resized()
    torch.testing.assert_close(said, predict_by_hand(folder)(path), rtol=1e-3, atol=1e-3)


def pixels_of(path):
    image = torch.frombuffer(bytearray(PILImage.open(path).convert("RGB").tobytes()), dtype=torch.uint8)
    width, height = PILImage.open(path).size
    return image.view(1, height, width, 3).permute(0, 3, 1, 2)


# ------------------------------------------------------------------------------------------------ training


def test_labelers_make_labels_and_never_change(root, tmp_path):
    with without_cards_and_pictures():
        trainer = trainer_of(root, tmp_path / "out", pair(root), save_steps=1, logging_steps=1)
        before = [labeler.sha256() for labeler in trainer.labelers]
        fresh = {name: value.clone() for name, value in trainer.module.state_dict().items()}
        results = trainer.train()
    assert results["final"].keys() == {"branch_0", "branch_1", "mean"}
    steps = [line for line in trainer.state.log_history if "unsupervised_loss" in line]
    assert len(steps) == 3 and all(line["unsupervised_loss"] > 0 for line in steps)
    assert [labeler.sha256() for labeler in trainer.labelers] == before and before[0] != before[1]
    for labeler, folder in zip(trainer.labelers, pair(root), strict=True):
        assert not any(module.training for module in labeler.branch.modules())
        assert not any(p.requires_grad or p.grad is not None for p in labeler.branch.parameters())
        saved = load_file(f"{folder}/model.safetensors")
        assert all(torch.equal(value, saved[name]) for name, value in labeler.branch.model.state_dict().items())
    # They are not trained, sharded, broadcast or saved.
    theirs = {id(t) for labeler in trainer.labelers for t in labeler.branch.state_dict(keep_vars=True).values()}
    assert not theirs & {id(t) for t in (*trainer.module.parameters(), *trainer.module.buffers())}
    assert trainer.module.state_dict().keys() == fresh.keys()
    saved = load_file(tmp_path / "out" / "checkpoint-3" / "model.safetensors")
    assert saved.keys() <= fresh.keys()
    moved = [name for name, value in trainer.module.state_dict().items() if not torch.equal(value, fresh[name])]
    assert any(name.startswith("branches.0") for name in moved) and any(n.startswith("branches.1") for n in moved)


def test_labels_come_from_the_labelers(root, tmp_path, monkeypatch):
    """If `predict` labels every pixel with both networks, mirrored and not, the pseudo labels are the same."""
    seen = []
    mixed = FixedTeacher._mixed
    monkeypatch.setattr(
        FixedTeacher,
        "_mixed",
        lambda self, labelers, batch: (
            seen.append((batch.weak, self._labels(labelers, batch.weak)[0])) or mixed(self, labelers, batch)
        ),
    )
    with without_cards_and_pictures():
        trainer = trainer_of(root, tmp_path / "out", pair(root), max_steps=1)
        trainer.train()
    branches = [labeler.branch for labeler in trainer.labelers]
    for images, labels in seen:
        assert (predict(branches, images, flip=True) == labels).float().mean() > 0.999  # except for ties
    assert len(seen) == 2 and len(seen[0][1].unique()) > 1


def test_one_student_may_learn_after_a_supervised_stage(root, tmp_path):
    with without_cards_and_pictures():
        trainer = trainer_of(root, tmp_path / "out", pair(root)[:1], max_steps=2, pretrain_steps=1, logging_steps=1)
        trainer.train()
    logs = [line for line in trainer.state.log_history if "supervised_loss" in line]
    assert ["unsupervised_loss" in line for line in logs] == [False, True]


@pytest.mark.parametrize("soft", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["hard", "soft"])
def test_a_run_is_resumed_bit_for_bit(root, tmp_path, soft):
    objective = FixedTeacher(labelers=pair(root), soft=soft, confidence_threshold=0.6)
    assert differences(root, CASE, tmp_path, objective=objective) == []


def test_a_checkpoint_identifies_labelers_without_paths(root, tmp_path):
    with without_cards_and_pictures():
        trainer_of(root, tmp_path / "out", pair(root), max_steps=1).train()
        goes_on = {"max_steps": 2, "resume_from_checkpoint": "auto"}
        with pytest.raises(ValueError, match="labeler 0, hash of its weights: "):
            trainer_of(root, tmp_path / "out", pair(root)[::-1], **goes_on).train()
        shutil.copytree(root / "run", tmp_path / "elsewhere")
        moved = [str(tmp_path / "elsewhere" / f"branch_{index}") for index in (0, 1)]
        trainer = trainer_of(root, tmp_path / "out", moved, **goes_on)
        trainer.train()
    assert trainer.state.first_step == 1 and trainer.state.global_step == 2


def test_no_local_path_gets_into_the_card(root, tmp_path):
    trainer = trainer_of(root, tmp_path / "out", pair(root), max_steps=1)
    card = render_card(card_facts(trainer.run, trainer.state, "branch_0", "branch_0"))
    assert str(root) not in card and "branch\\_1" in card and "FixedTeacher" in card


PROGRAM = str(SUPPORT / "run_toy_steps.py")


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True], ids=["DDP", "FSDP2"])
def test_two_processes_and_accumulation_take_the_steps_of_one(root, tmp_path, sharded):
    def steps(name, *words, **options):
        out = tmp_path / f"{name}.pt"
        words = (*words, "--settings", '{"logging_steps": 1}')
        done = launch(PROGRAM, str(out), "--labelers", *pair(root), *words, **options)
        assert done.returncode == 0, done.stderr[-3000:]
        return torch.load(out)

    config = {"config_file": SUPPORT.parents[1] / "examples" / "configs" / "accelerate" / "fsdp2.yaml"}
    one = steps("one", "--batch", "4")
    two = steps("two", "--batch", "2", processes=2, **(config if sharded else {}))
    assert two["processes"] == 2 and len(one["logs"]) == 3
    others = [two] if sharded else [two, steps("accumulated", "--batch", "2", "--accumulation", "2")]
    for other in others:
        for name, expected in one["parameters"].items():
            torch.testing.assert_close(other["parameters"][name], expected, rtol=1e-4, atol=4e-6)
        for a, b in zip(one["logs"], other["logs"], strict=True):
            for key in ("loss", "supervised_loss", "unsupervised_loss", "mask_ratio"):
                assert a[key] == pytest.approx(b[key], rel=1e-4), key
    if not sharded:
        local = steps("local", "--batch", "2", "--local_counts", processes=2)
        changed = [(local["parameters"][n] - p).abs().max().item() for n, p in one["parameters"].items()]
        assert max(changed) > 1e-2


# ------------------------------------------------------------------------------------------------ errors


def test_a_labeler_has_the_runs_classes(root, tmp_path):
    more = tiny_branch(tmp_path / "more", 4)
    with pytest.raises(ValueError, match=r"more has 4 classes \(class 0, .*and this run has 3 \(ground, disc, bar\)"):
        load([str(more)])
    other = tiny_branch(tmp_path / "other", 3, names=("ground", "disc", "tree"))
    with pytest.raises(ValueError, match="class 2 of .*other is 'tree', and of this run 'bar'"):
        load([str(other)])
    turned = tiny_branch(tmp_path / "turned", 3, names=("disc", "ground", "bar"))
    with pytest.raises(ValueError, match="class 0 of .*turned is 'disc', and of this run 'ground'"):
        load([str(turned)])
    unnamed = tiny_branch(tmp_path / "unnamed", 3, names=[f"LABEL_{i}" for i in range(3)])
    assert len(load([str(unnamed)])) == 1


def test_sources_that_are_not_branches_are_rejected_early(root, tmp_path, monkeypatch):
    monkeypatch.chdir(root)
    (tmp_path / "empty").mkdir()
    for source, said in (
        (str(root / "run"), "run is the folder of a run. Name networks in it, like .*branch_0 .it has branch_0, br"),
        ("run", "run is the folder of a run. Name networks in it, like run/branch_0"),
        ("run/branch_7", "there is no folder run/branch_7. Name folders of exported branches"),
        (str(tmp_path / "nothing"), "there is no folder .*nothing"),
        (str(tmp_path / "empty"), "empty contains no model .config.json is missing"),
        ("run/branch_0/config.json", "there is no folder run/branch_0/config.json"),
    ):
        with pytest.raises(ValueError, match=f"`labelers`: .*{said}"):
            trainer_of(root, tmp_path / "out", [pair(root)[0], source])


def test_a_folder_without_an_image_processor_is_named(root, tmp_path):
    folder = shutil.copytree(root / "run" / "branch_0", tmp_path / "branch_0")
    for name in ("preprocessor_config.json", "processor_config.json"):
        (folder / name).unlink(missing_ok=True)
    with pytest.raises(ValueError, match="branch_0`: no image processor .preprocessor_config.json. could be read"):
        load([str(folder)])


def test_without_labelers_the_unlabeled_set_needs_labels(root, tmp_path):
    trainer = make_trainer(root, CASE, tmp_path / "out")
    bare = trainer.unlabeled_dataset.remove_columns("pseudo_label")
    with pytest.raises(ValueError, match="FixedTeacher needs labels of the unlabeled images. Name the trained netw"):
        make_trainer(root, CASE, tmp_path / "out", unlabeled_dataset=bare)
    others = LabelEncoding(names=("ground", "disc", "tree")).to_feature()
    other = trainer.unlabeled_dataset.cast_column("pseudo_label", others)
    with pytest.raises(
        ValueError, match="'pseudo_label' of `unlabeled_dataset` have different classes: .*'bar'.*'tree'"
    ):
        make_trainer(root, CASE, tmp_path / "out", unlabeled_dataset=other)


def test_one_or_several_are_named_on_the_command_line(root, tmp_path):
    for words, expected in ((["a/b"], ["a/b"]), (["a/b", "c"], ["a/b", "c"])):
        found = parser.parse(Settings, ["--objective", "fixed_teacher", "--labelers", *words])
        assert found.objective == FixedTeacher(labelers=expected)
        (tmp_path / "config.yaml").write_text(found.to_yaml())
        assert parser.parse(Settings, ["--config", str(tmp_path / "config.yaml")]).objective == found.objective
    assert json.dumps(found.flat()["labelers"]) == '["a/b", "c"]'
