"""Models against the data's classes, the optimizer and each other: errors before step 1, or after it."""

import json

import pytest
import torch
from support.toy import ID2LABEL, NAMES, settings, tiny_branch, tiny_upernet, toy_models, write_world
from transformers import AutoModelForSemanticSegmentation, BeitImageProcessor

from cps_hf.objectives import CrossPseudoSupervision, Supervised
from cps_hf.training.trainer import CPSTrainer

SIZES = [(40, 56), (56, 40), (48, 48), (37, 61)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    return {
        "train_dataset": write_world(root / "labeled", SIZES),
        "unlabeled_dataset": write_world(root / "unlabeled", SIZES, first=50, labels=False),
        "eval_dataset": write_world(root / "eval", SIZES[:2], first=90),
    }


def trainer_for(world, tmp_path, models, objective=None, optimizers=(None, None), **fields):
    values = {"output_dir": str(tmp_path / "out"), "max_steps": 2, "per_device_train_batch_size": 2}
    values |= {"crop_size": [32, 32], "optim": "adamw", "learning_rate": 1e-2, "dataloader_num_workers": 0}
    values |= {"disable_tqdm": True, "num_pictures": 0, "agreement_images": 0}
    objective = objective or CrossPseudoSupervision()
    return CPSTrainer(models, **settings(**(values | fields)), objective=objective, optimizers=optimizers, **world)


def named(id2label):
    models = toy_models()
    for model in models:
        model.config.id2label = id2label
    return models


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["disc", "ground", "bar"], "class 0 is 'disc' there and 'ground' in `train_dataset`"),
        (["ground", "disc", "tumor"], "class 2 is 'tumor' there and 'bar' in `train_dataset`"),
    ],
)
def test_passed_models_must_name_the_datas_classes(world, tmp_path, names, found):
    with pytest.raises(ValueError, match=f"branch 0 differ from the data's: {found}") as error:
        trainer_for(world, tmp_path, named(dict(enumerate(names))))
    advised = str(error.value).split("`model.config.id2label = ")[1].split("`")[0]
    assert eval(advised) == ID2LABEL
    assert trainer_for(world, tmp_path, named(eval(advised))).id2label == ID2LABEL  # as the message advises


def test_a_branch_is_exported_with_the_datas_names(world, tmp_path):
    text_keys, capitals = {str(i): name for i, name in ID2LABEL.items()}, {0: "Ground", 1: "DISC", 2: "bar"}
    for id2label in (text_keys, capitals, {i: f"LABEL_{i}" for i in range(3)}):
        trainer = trainer_for(world, tmp_path, named(id2label), Supervised(), max_steps=1)
        assert trainer.id2label == ID2LABEL
    trainer.train()
    for folder in ("branch_0", "branch_1", "best"):
        config = json.loads((tmp_path / "out" / folder / "config.json").read_text())
        assert config["id2label"] == {str(i): name for i, name in ID2LABEL.items()}
        assert config["label2id"] == {name: i for i, name in ID2LABEL.items()}
        assert "| ground |" in (tmp_path / "out" / folder / "README.md").read_text()


def test_unnamed_data_use_the_models_class_names(tmp_path, caplog):
    bare = {"train_dataset": write_world(tmp_path / "bare", SIZES, encoding=False)}
    sky = {"0": "sky", "1": "tumor", "2": "bone"}
    trainer = trainer_for(bare, tmp_path, named(sky), Supervised())
    assert trainer.id2label == {0: "sky", 1: "tumor", 2: "bone"} and not caplog.records
    config = tiny_upernet()
    config.id2label, config.label2id = trainer.id2label, {name: i for i, name in trainer.id2label.items()}
    AutoModelForSemanticSegmentation.from_config(config).save_pretrained(tmp_path / "m")
    assert trainer_for(bare, tmp_path, str(tmp_path / "m"), Supervised()).id2label == trainer.id2label
    assert "The 3 classes of" in caplog.text and "(sky, tumor, bone)" in caplog.text
    assert "do_reduce_labels" not in caplog.text
    BeitImageProcessor(do_reduce_labels=True).save_pretrained(tmp_path / "m")
    trainer_for(bare, tmp_path, str(tmp_path / "m"), Supervised())
    assert "0 is ignored and 1 is class 0 (`do_reduce_labels`" in caplog.text
    with pytest.raises(ValueError, match=r"branch 0 must name the classes 0, 1, .*got the indices \[1, 2, 3\]"):
        trainer_for(bare, tmp_path, named({1: "sky", 2: "tumor", 3: "bone"}), Supervised())


def test_a_frozen_branch_is_named(world, tmp_path):
    models = toy_models()
    models[1].requires_grad_(False)
    with pytest.raises(ValueError, match="Branch 1, a Toy.*nothing to train: all of its parameters are frozen"):
        trainer_for(world, tmp_path, models)
    models[1].requires_grad_(True)  # as the message advises
    trainer_for(world, tmp_path, models)
    models[0].decode_head.requires_grad_(False)
    with pytest.raises(ValueError, match="Branch 0.*remove what freezes more \\(`freeze_backbone`\\)"):
        trainer_for(world, tmp_path, models, freeze_backbone=True)


def test_a_branch_without_effective_weights_is_named(world, tmp_path):
    models = toy_models()
    models[1].requires_grad_(False)
    models[1].unused = torch.nn.Linear(3, 3)
    with pytest.raises(
        ValueError, match="Branch 1.*depend on none of the trainable parameters.*unused.weight, unused.bias"
    ):
        trainer_for(world, tmp_path, models)


def test_a_users_optimizer_must_train_every_branch(world, tmp_path, caplog):
    models, others = toy_models(), toy_models(seed=7)

    def optimizer(*of):
        return torch.optim.SGD([p for model in of for p in model.parameters()], lr=0.1), None

    for given, branch in ((optimizer(models[0]), 1), (optimizer(*others), 0)):
        with pytest.raises(ValueError, match=f"contains no parameter of branch {branch}, which would never learn"):
            trainer_for(world, tmp_path, models, optimizers=given)
    given = torch.optim.SGD([*models[0].parameters(), *models[1].decode_head.parameters()], lr=0.1)
    trainer_for(world, tmp_path, models, optimizers=(given, None))
    assert "omits 2 of the 4 trainable parameters of branch 1" in caplog.text and "backbone.weight" in caplog.text
    trainer_for(world, tmp_path, models, optimizers=optimizer(*models))


def test_identical_branches_cannot_teach_each_other(world, tmp_path):
    models = [toy_models(1)[0], toy_models(1)[0]]
    with pytest.raises(ValueError, match="branches 0 and 1 have the same weights"):
        trainer_for(world, tmp_path, models)
    trainer_for(world, tmp_path, models, Supervised())


def test_branches_that_are_equal_after_the_first_step_end_the_run(world, tmp_path):
    trainer = trainer_for(world, tmp_path, toy_models(), max_steps=3)
    with torch.no_grad():  # like a checkpoint from before this check existed
        for p, q in zip(*(model.parameters() for model in trainer.models), strict=True):
            q.copy_(p)
    with pytest.raises(ValueError, match="Branches 0 and 1 are one network: after step 1 all of their weights are"):
        trainer.train()
    assert not (tmp_path / "out" / "branch_0").exists()
    steps = trainer_for(world, tmp_path / "b", toy_models(), max_steps=3).train()["steps"]
    assert steps == 3


def test_a_trained_branch_can_start_two_different_branches(world, tmp_path):
    finished = str(tiny_branch(tmp_path / "best", 3, names=NAMES))
    trainer = trainer_for(world, tmp_path, finished, max_steps=1)
    a, b = (dict(model.named_parameters()) for model in trainer.models)
    equal = {name for name in a if torch.equal(a[name], b[name])}
    assert {name for name in a if "backbone" in name} <= equal and "decode_head.classifier.weight" not in equal
    trainer.train()
    assert not torch.equal(*[p["backbone.embedder.embedder.convolution.weight"] for p in (a, b)])
