"""`cps-hf train` on small data sets in the real layouts, in one process and launched in two."""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from support.own_folders import write_files
from support.toy import run_python

from cps_hf.commands import train
from cps_hf.commands.datasets import DataConfig, TrainingSets, load_data
from cps_hf.scenes.write import write_object_scenes, write_street_scenes

SMALL = ("--max_steps", "3", "--crop_size", "32", "--dataloader_num_workers", "0", "--disable_tqdm", "true")
SMALL += ("--per_device_train_batch_size", "2", "--per_device_unlabeled_batch_size", "4", "--num_pictures", "1")


@pytest.fixture(scope="module")
def streets(tmp_path_factory):
    root = tmp_path_factory.mktemp("streets") / "set"
    return write_street_scenes(root, num_train=24, num_train_extra=4, num_val=3, progress=False)


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    return write_object_scenes(tmp_path_factory.mktemp("objects") / "set", num_train=10, num_val=3, progress=False)


def run(tmp_path, *words):
    given = {word for word in words if word.startswith("--")}
    small = [word for pair in zip(SMALL[::2], SMALL[1::2], strict=True) if pair[0] not in given for word in pair]
    return train.main([*words, *small, "--output_dir", str(tmp_path / "out")])


@pytest.mark.slow
def test_cityscapes_in_the_official_layout(streets, tmp_path, capsys):
    results = run(tmp_path, "--dataset", "cityscapes", "--data_root", str(streets), "--partition", "1-4")
    out = capsys.readouterr().out
    for said in (
        "road",
        "bicycle",
        "mIoU",
        "Best: branch",
        "at the start",
        "best/",
        "AutoModelForSemanticSegmentation",
    ):
        assert said in out
    card = (tmp_path / "out" / "best" / "README.md").read_text(encoding="utf-8")
    assert "](<predictions.png>)" in card, "of drawn scenes, which may leave the machine"
    assert results["partition"]["name"] and len(results["partition"]["sha256"]) == 64
    config = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert config["data_root"] == str(streets) and config["partition"] == "1-4" and config["objective"] == "cps"
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert written["partition"] == results["partition"] and written["steps"] == 3


@pytest.mark.slow
def test_its_own_config_file_repeats_the_run(streets, tmp_path):
    run(tmp_path / "a", "--dataset", "cityscapes", "--data_root", str(streets), "--partition", "4")
    train.main(["--config", str(tmp_path / "a" / "out" / "config.yaml"), "--output_dir", str(tmp_path / "b" / "out")])
    first, again = (json.loads((tmp_path / run / "out" / "results.json").read_text()) for run in "ab")
    assert again["final"] == first["final"] and again["agreement"] == first["agreement"]


@pytest.mark.slow
def test_voc_with_images_of_many_sizes_and_supervised_training(objects, tmp_path):
    results = run(
        tmp_path,
        "--dataset",
        "voc",
        "--data_root",
        str(objects),
        "--partition",
        "4",
        "--objective",
        "supervised",
    )
    assert results["objective"]["name"] == "Supervised"
    assert len(results["final"]["branch_0"]["per_category_iou"]) == 21


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """labeled/{train,val}/{images,masks} and unlabeled/images, and the same as parquet shards."""
    from support.toy import NAMES, write_world

    root = tmp_path_factory.mktemp("folders")
    for split, count in (("train", 5), ("val", 3)):
        write_world(root / "flat" / split, [(40, 56), (33, 48), (64, 40), (40, 40), (50, 34)][:count])
        for path in sorted((root / "flat" / split).glob("*.png")):
            kind, name = ("masks", path.name.replace("_label", "")) if "_label" in path.name else ("images", path.name)
            (root / "labeled" / split / kind).mkdir(parents=True, exist_ok=True)
            path.rename(root / "labeled" / split / kind / name)
    (root / "labeled" / "names.json").write_text(json.dumps(NAMES))
    write_world(root / "unlabeled" / "images", [(40, 56)] * 6, first=30)
    for path in (root / "unlabeled" / "images").glob("*_label.png"):
        path.unlink()
    return root


@pytest.mark.slow
def test_folders_with_separate_unlabeled_images(folders, tmp_path):
    options = json.dumps({"class_names": str(folders / "labeled" / "names.json")})
    words = ("--dataset", "folder", "--data_root", str(folders / "labeled"), "--load_options", options)
    results = run(tmp_path, *words, "--unlabeled_root", str(folders / "unlabeled"))
    assert len(results["final"]["mean"]["per_category_iou"]) == 3 and results["partition"]["name"] is None
    again = run(tmp_path / "again", *words, "--partition", "3", "--per_device_unlabeled_batch_size", "2")
    assert again["partition"]["name"].startswith("3")


def test_images_that_a_partition_leaves_unlabeled_need_no_mask(folders, tmp_path):
    root = tmp_path / "set"
    shutil.copytree(folders / "labeled", root)
    for name in ("1", "3", "4"):
        (root / "train" / "masks" / f"{name}.png").unlink()
    (tmp_path / "list.txt").write_text("0\n2\n")
    data = DataConfig(dataset="folder", data_root=str(root), partition=str(tmp_path / "list.txt"))
    labeled, unlabeled, evaluation, chosen, _ = load_data(data)
    assert labeled["id"] == ["0", "2"] and unlabeled["id"] == ["1", "3", "4"] and len(evaluation) == 3
    assert "label" in labeled.column_names and "label" not in unlabeled.column_names and chosen.name == "list.txt"


def test_images_in_two_sets_are_reported(folders, tmp_path, caplog):
    root = tmp_path / "set"
    shutil.copytree(folders / "labeled", root)
    shutil.copytree(root / "val" / "images", root / "more" / "images")  # other images with the same names
    (tmp_path / "link").symlink_to(root)

    def said(unlabeled_root):
        caplog.clear()
        load_data(DataConfig(dataset="folder", data_root=str(root), unlabeled_root=unlabeled_root))
        return [record.message for record in caplog.records if record.levelname == "WARNING"]

    assert said(str(root / "more")) == []
    (message,) = said(str(tmp_path / "link" / "val"))
    assert message.startswith("3 of the 3 evaluation images are also unlabeled images, e.g. ")
    (message,) = said(str(root / "train"))
    assert message.startswith("The 5 unlabeled images are all labeled images as well")


def test_separate_unlabeled_images_need_no_partition(tmp_path):
    words = ["--dataset", "folder", "--data_root", "x", "--unlabeled_root", "y"]
    for optim in ("sgd", "adamw"):
        settings = train.parse([*words, "--optim", optim])
        (tmp_path / "config.yaml").write_text(settings.to_yaml())
        assert train.parse(["--config", str(tmp_path / "config.yaml")]) == settings
        assert yaml.safe_load((tmp_path / "config.yaml").read_text())["partition"] is None
    assert train.parse([]).data.partition == "12"


def test_without_a_partition_a_method_reports_no_unlabeled_images(folders, tmp_path, capsys):
    options = json.dumps({"class_names": str(folders / "labeled" / "names.json")})
    words = ["--dataset", "folder", "--data_root", str(folders / "labeled"), "--load_options", options]
    words += ["--output_dir", str(tmp_path / "out")]
    settings = train.parse([*words, "--objective", "supervised"])
    assert settings.data.partition is None
    sets = train.load_data(settings.data)
    count = len(sets.labeled)
    assert count > 0 and sets.unlabeled is None and sets.chosen is None
    with pytest.raises(SystemExit, match="2"):
        train.main(words)
    said = capsys.readouterr().err
    assert (
        f"CrossPseudoSupervision learns from unlabeled images, and all {count} images of `train` are labeled" in said
    )
    assert "`--unlabeled_root`" in said and "`--partition`" in said and "`--objective supervised`" in said


@pytest.mark.parametrize(
    ("words", "steps", "optim"),
    [
        ([], 800, "adamw"),
        (["--dataset", "voc", "--data_root", "x"], 40_000, "sgd"),
        (["--data-root=x"], 40_000, "sgd"),
        (["--dataset", "object_scenes"], 800, "adamw"),
        (["--dataset", "folder"], 40_000, "sgd"),
        (["--dataset=hub"], 40_000, "sgd"),
    ],
)
def test_help_shows_the_defaults_that_would_apply(capsys, words, steps, optim):
    with pytest.raises(SystemExit):
        train.parse([*words, "--help"])
    assert f"stages if there are two. (default: {steps})" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(SystemExit):
        train.parse([*words, "--help-all"])
    text = " ".join(capsys.readouterr().out.split())
    assert f"stages if there are two. (default: {steps})" in text and f'"sgd" or "adamw". (default: {optim})' in text


@pytest.mark.slow
def test_parquet_shards_as_streams(folders, tmp_path):
    from datasets import concatenate_datasets

    from cps_hf.data import load_folder

    options = {"class_names": folders / "labeled" / "names.json"}
    for split in ("train", "val"):
        dataset = load_folder(folders / "labeled", split, **options)
        (tmp_path / "shards").mkdir(exist_ok=True)
        concatenate_datasets([dataset]).to_parquet(tmp_path / "shards" / f"{split}-00000-of-00001.parquet")
    unlabeled = load_folder(folders / "unlabeled", with_labels=False)
    (tmp_path / "more").mkdir()
    unlabeled.to_parquet(tmp_path / "more" / "train-00000-of-00001.parquet")
    words = ("--dataset", "hub", "--data_root", str(tmp_path / "shards"), "--unlabeled_root", str(tmp_path / "more"))
    results = run(tmp_path, *words, "--streaming", "true")
    assert results["steps"] == 3 and len(results["final"]["branch_0"]["per_category_iou"]) == 3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--dataset", "cityscape"], "`--dataset` must be one of .*'cityscape'"),
        (["--dataset", "voc"], "`--dataset voc` needs `--data_root`"),
        (["--dataset", "voc", "--data_root", "nowhere"], "No VOC2012 at nowhere"),
        (["--dataset", "cityscapes", "--data_root", "nowhere"], "No folder nowhere"),
        (["--streaming", "true"], "`--streaming` needs `--unlabeled_root`"),
        (["--unlabeled_root", "x"], "`--unlabeled_root` requires"),
        (
            ["--dataset", "folder", "--data_root", "x", "--unlabeled_root", "y", "--partition", "1-8"],
            "Remove `--part",
        ),
        (
            ["--dataset", "hub", "--data_root", "x", "--unlabeled_root", "y", "--partition_seed", "3"],
            "Remove `--part",
        ),
        (["--train_split", "val"], "`--train_split` and `--eval_split` are both 'val'"),
        (["--lr_scheduler_type", "poly"], "`--lr_scheduler_type` must be one of"),
        (["--max_step", "5"], "Did you mean `--max_steps`"),
        (["--load_options", '{"color": 1}'], "load_cityscapes has no argument 'color'"),
    ],
)
def test_a_mistake_ends_with_one_line_and_no_traceback(tmp_path, capsys, words, said):
    with pytest.raises(SystemExit) as exit_:
        run(tmp_path, *words)
    message = capsys.readouterr().err
    assert exit_.value.code == 2 and re.search(said, message) and "Traceback" not in message


def test_an_unusable_output_folder_fails_before_data_is_read(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "results.json").touch()
    (tmp_path / "closed").mkdir()
    monkeypatch.setattr(train, "load_data", None)
    may = os.access  # a superuser may write anywhere
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "closed" and may(path, mode))
    for name, said in (
        ("file/run", f"{tmp_path}/file is a file"),
        ("run", "contains a run (results.json)"),
        ("closed/a/b", f"no permission for {tmp_path}/closed"),
    ):
        with pytest.raises(SystemExit) as exit_:
            train.main(["--output_dir", str(tmp_path / name)])
        message = capsys.readouterr().err
        assert exit_.value.code == 2 and said in message and "Traceback" not in message


@pytest.mark.slow
def test_two_processes_with_bfloat16_and_accumulation(streets, tmp_path):
    done = run_python(
        *("-m", "cps_hf", "train", "--dataset", "cityscapes", "--data_root", str(streets), "--partition", "8"),
        *("--max_steps", "3"),
        *("--crop_size", "32", "64", "--dataloader_num_workers", "1", "--per_device_train_batch_size", "2"),
        *("--gradient_accumulation_steps", "2", "--mixed_precision", "bf16", "--num_processes", "2"),
        *("--per_device_unlabeled_batch_size", "3", "--output_dir", str(tmp_path / "out")),
        processes=2,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("mIoU  ") == 1 and "2 processes" in done.stderr
    assert (tmp_path / "out" / "best" / "model.safetensors").is_file()
    assert (tmp_path / "out" / "checkpoint-3" / "random_states_1.pkl").is_file()


def test_the_config_file_has_the_settings_the_trainer_chose(tmp_path, monkeypatch):
    """A checkpoint's mean, and the batch size that fits into memory."""
    settings = train.parse(["--output_dir", str(tmp_path)])
    settled = replace(settings.model_config, image_mean=[0.1, 0.2, 0.3])
    trainers = lambda *models, **given: SimpleNamespace(**given | {"model_config": settled})  # noqa: E731
    monkeypatch.setattr(train, "CPSTrainer", trainers)
    trainer, _ = train.build(settings, TrainingSets(None, None, None, None))
    fitted = replace(settings.args, per_device_train_batch_size=1)
    trainer.callbacks[0].on_train_begin(fitted, SimpleNamespace(is_world_process_zero=True), None)
    written = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert (written["image_mean"], written["per_device_train_batch_size"]) == ([0.1, 0.2, 0.3], 1)


def test_a_model_path_may_be_relative_to_the_config_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "net.json").write_text("{}")
    (tmp_path / "recipes" / "here.json").write_text("{}")
    (tmp_path / "here.json").write_text("{}")
    (tmp_path / "recipes" / "r.yaml").write_text("models: [net.json, here.json, nvidia/mit-b2]\n")
    found = train.parse(["--config", "recipes/r.yaml", "--data_root", "x"]).data.models
    assert found == [str(Path("recipes/net.json")), "here.json", "nvidia/mit-b2"]


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A typical user's folder: ten images, six of them with a mask."""
    root = tmp_path_factory.mktemp("own") / "my photos"
    write_files(root, *(f"{i}.jpg" for i in range(10)), *(f"masks/{i}_mask.png" for i in range(6)))
    return root


def test_a_positional_folder_is_an_own_data_set_and_is_saved(own, tmp_path):
    words = [str(own), "--class_names", "sky", "road", "--validation", "none", "--group_by", "(.)"]
    settings = train.parse([*words, "--output_dir", str(tmp_path)])
    data = settings.data
    assert (data.dataset, data.data_root, data.validation, data.group_by) == ("own", str(own), "none", "(.)")
    assert data.partition is None and data.named_classes == ["sky", "road"]
    (tmp_path / "config.yaml").write_text(settings.to_yaml())
    assert train.parse(["--config", str(tmp_path / "config.yaml")]) == settings
    (tmp_path / "scenes.yaml").write_text("dataset: street_scenes\nmax_steps: 7\nvalidation: 0.5\n")
    typed = train.parse([str(own), "--config", str(tmp_path / "scenes.yaml")])
    assert (typed.data.dataset, typed.data.validation, typed.args.max_steps) == ("own", "0.5", 7)
    assert train.parse([str(own), "--dataset", "folder"]).data.dataset == "folder"


@pytest.mark.parametrize(
    ("words", "named"),
    [(["a, b"], ["a", "b"]), (["names.json"], "names.json"), (["a", "b c"], ["a", "b c"]), ([], None), (["a"], ["a"])],
)
def test_class_names_are_words_or_one_file(words, named):
    assert DataConfig(class_names=words, dataset="own", data_root="x").named_classes == named


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--streaming", "true", "--unlabeled_root", "y"], "`--streaming` cannot be used with a folder of your own"),
        (["--partition", "3"], "`--partition` cannot be used with a folder of your own"),
        (["--eval_split", "test"], "splits are found automatically. Remove `--train_split` .*`--validation test`"),
        (["--dataset", "folder", "--validation", "0.3"], "`--validation` requires a folder of your own"),
        (["--dataset", "folder", "--group_by", "x"], "`--group_by` requires a folder of your own"),
        (["--dataset", "voc", "--class_names", "x"], "`--class_names` requires `--dataset` own, folder or hub"),
        (["--data_root", "y"], "`--data_root` is given twice"),
        (["--load_options", '{"colour": 1}'], "`--load_options` of an own folder: no 'colour'"),
        (["--validation", "7"], "`--validation` must be a share between 0 and 1"),
    ],
)
def test_options_invalid_for_an_own_folder_fail_in_one_line(own, tmp_path, capsys, words, said):
    with pytest.raises(SystemExit) as exit_:
        train.main([str(own), *words, "--output_dir", str(tmp_path / "out")])
    message = capsys.readouterr().err
    assert exit_.value.code == 2 and re.search(said, message) and message.count("\n") == 1


def test_class_names_reach_the_folder_loader_too(folders, tmp_path):
    data = DataConfig(dataset="folder", data_root=str(folders / "labeled"), class_names=["a", "b", "c"])
    assert '"names":["a","b","c"]' in load_data(data).labeled.features["label"].id
    assert load_data(replace(data, class_names=[str(folders / "labeled" / "names.json")])).found is None


def test_without_unlabeled_images_the_error_suggests_sources(own, tmp_path, capsys):
    shutil.copytree(own, tmp_path / "set")
    for i in range(6, 10):
        (tmp_path / "set" / f"{i}.jpg").unlink()
    with pytest.raises(SystemExit):
        train.main([str(tmp_path / "set"), "--output_dir", str(tmp_path / "out"), "--objective", "cps"])
    out, err = capsys.readouterr()
    assert "labeled           5" in out and "unlabeled         0" in out  # the table comes first
    assert "all images to train on in" in err and "`--unlabeled_root`" in err and "`--objective supervised`" in err


@pytest.mark.slow
def test_the_held_out_images_are_listed_and_a_resumed_run_keeps_them(own, tmp_path, capsys):
    steps = ("--save_steps", "2", "--optim", "adamw")
    results = run(tmp_path, str(own), "--max_steps", "2", *steps)
    assert results["num_labeled"] == 5 and results["num_unlabeled"] == 4 and results["dataset"] == "my photos"
    out = tmp_path / "out"
    listed = (out / "validation.txt").read_text().split()
    table = capsys.readouterr().out
    assert len(listed) == 1 and f"held out: {listed[0]}" in table and table.index("held out") < table.index("mIoU")
    other = tmp_path / "other.txt"
    other.write_text("3" if listed == ["2"] else "2")
    resumed = ("--max_steps", "3", "--resume_from_checkpoint", "auto", *steps)
    with pytest.raises(SystemExit):  # it would train on its validation images
        run(tmp_path, str(own), *resumed, "--validation", str(other))
    assert "train_dataset, hash of the ids" in capsys.readouterr().err
    assert (out / "validation.txt").read_text().split() == listed
    again = run(tmp_path, str(own), *resumed, "--validation", str(out / "validation.txt"))
    assert again["steps"] == 3
