"""Scoring branches from folders, checked against the metric called directly and against Cityscapes' own evaluator."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.full_disk import full_disk
from support.toy import (
    MEAN,
    STD,
    predict_by_hand,
    tiny_branch,
    tiny_upernet,
    toy_models,
    write_world,
)
from transformers import (
    AutoModelForSemanticSegmentation,
    DPTConfig,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SegformerImageProcessor,
)

from cps_hf.commands import evaluate
from cps_hf.data.cityscapes import LABELS
from cps_hf.data.masks import output_path, write_label_ids, write_mask
from cps_hf.data.voc import voc_color
from cps_hf.hub.export import export_branch
from cps_hf.inference.ensemble import Ensemble, check_classes
from cps_hf.metrics.mean_iou import MeanIoU
from cps_hf.scenes.write import write_object_scenes, write_street_scenes


@pytest.fixture(scope="module")
def streets(tmp_path_factory):
    root = tmp_path_factory.mktemp("streets") / "set"
    return write_street_scenes(root, num_train=1, num_train_extra=0, num_val=3, size=(64, 128), progress=False)


@pytest.fixture(scope="module")
def street_branches(tmp_path_factory):
    from cps_hf.data.cityscapes import NAMES

    folder = tmp_path_factory.mktemp("branches")
    return [tiny_branch(folder / str(seed), 19, seed, NAMES) for seed in range(2)]


def run(tmp_path, *words):
    return evaluate.main([*map(str, words), "--output_dir", str(tmp_path / "out"), "--num_workers", "0"])


def test_cityscapes_evaluator_agrees_on_the_exported_files(streets, street_branches, tmp_path, monkeypatch, capsys):
    results = run(
        tmp_path,
        *("--branches", *street_branches, "--dataset", "cityscapes", "--data_root", streets, "--export", "cityscapes"),
    )
    import cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling as official

    args = official.args
    for name, value in {"evalInstLevelScore": False, "quiet": True, "JSONOutput": False}.items():
        monkeypatch.setattr(args, name, value)
    monkeypatch.setattr(args, "predictionPath", str(tmp_path / "out" / "predictions"))
    monkeypatch.setattr(args, "predictionWalk", None)
    truths = sorted(str(path) for path in (streets / "gtFine" / "val").glob("*/*_labelIds.png"))
    guesses = [official.getPrediction(args, truth) for truth in truths]
    theirs = official.evaluateImgLists(guesses, truths, args)
    ours = results["scores"]["mean"]
    assert len(truths) == results["num_images"] == 3
    assert ours["mean_iou"] == pytest.approx(theirs["averageScoreClasses"], abs=1e-9)
    iou_by_name = dict(zip(results["classes"], ours["per_category_iou"], strict=True))
    assert 0 < ours["mean_iou"] < 1
    ignored = {label.name for label in LABELS if label.train_id == 255}  # there, with NaN, in the official table too
    counted = {name: value for name, value in theirs["classScores"].items() if name not in ignored}
    assert counted.keys() == iou_by_name.keys() and len(counted) == 19
    assert all(np.isnan(theirs["classScores"][name]) for name in ignored & theirs["classScores"].keys())
    for name, value in counted.items():
        assert iou_by_name[name] == pytest.approx(value, abs=1e-9, nan_ok=True)


def test_results_equal_the_metric_and_every_branch_is_scored(streets, street_branches, tmp_path, capsys):
    words = ("--branches", *street_branches, "--each", "--dataset", "cityscapes", "--data_root", streets)
    run(tmp_path, *words, "--num_pictures", 2)
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    networks = [predict_by_hand(folder) for folder in street_branches]
    metrics = {row: MeanIoU(num_labels=19) for row in ("branch_0", "branch_1", "mean")}
    to_train_id = {label.id: label.train_id for label in LABELS}
    single = {}
    for path in sorted((streets / "leftImg8bit" / "val").glob("*/*.png")):
        truth_path = str(path).replace("leftImg8bit.png", "gtFine_labelIds.png").replace("leftImg8bit", "gtFine")
        truth = np.vectorize(to_train_id.get)(np.asarray(Image.open(truth_path)))[None]
        logits = [network(path) for network in networks]
        guesses = {f"branch_{i}": each.argmax(1) for i, each in enumerate(logits)}
        guesses["mean"] = (logits[0].softmax(1) + logits[1].softmax(1)).argmax(1)
        for row, metric in metrics.items():
            metric.add_batch(predictions=guesses[row], references=truth)
        name = path.name.removesuffix("_leftImg8bit.png")
        single[name] = MeanIoU(num_labels=19).compute(predictions=guesses["mean"], references=truth)["mean_iou"]
    matrix = metrics["mean"].confusion_matrix
    assert written["confusion_matrix"] == matrix.tolist()
    for row, metric in metrics.items():
        expected = metric.compute()
        for key, value in expected.items():
            shown = np.array(written["scores"][row][key], float)  # null is NaN
            np.testing.assert_allclose(shown, value, rtol=1e-12)
    assert [image["id"] for image in written["images"]] == sorted(single, key=single.get)
    assert {image["id"]: image["mean_iou"] for image in written["images"]} == pytest.approx(single)
    with open(tmp_path / "out" / "confusion_matrix.csv", encoding="utf-8") as file:
        header, *lines = csv.reader(file)
    assert header[1:] == written["classes"] and [line[0] for line in lines] == written["classes"]
    assert [[int(value) for value in line[1:]] for line in lines] == matrix.tolist()
    pictures = sorted(path.name for path in (tmp_path / "out" / "pictures").iterdir())
    assert pictures == ["confusion_matrix.png", "worst.png"]
    out = capsys.readouterr().out
    assert f"{100 * written['scores']['mean']['mean_iou']:.2f}" in out and "boundary IoU" in out


def test_a_run_folder_means_its_better_branch(streets, street_branches, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "best").symlink_to(street_branches[1])
    where = ("--dataset", "cityscapes", "--data_root", streets)
    by_run, by_name = (
        run(tmp_path, *words, *where) for words in ((tmp_path / "run",), ("--branches", street_branches[1]))
    )
    mine, theirs = ([*found["scores"].values()] for found in (by_run, by_name))
    assert json.dumps(mine) == json.dumps(theirs)  # as text, in which NaN equals NaN
    with pytest.raises(SystemExit):
        run(tmp_path, tmp_path / "run", "--branches", street_branches[0], *where)
    assert "not both" in capsys.readouterr().err


@pytest.mark.slow
def test_the_mean_does_not_depend_on_scoring_each_branch(streets, street_branches, tmp_path):
    words = ("--branches", *street_branches, "--dataset", "cityscapes", "--data_root", streets)
    words += ("--mode", "sliding", "--crop_size", 48, 64, "--flip", "--scales", 0.75, 1)
    each, mean = (run(tmp_path / str(i), *words, *more) for i, more in enumerate([["--each"], []]))
    assert [*each["scores"]] == ["branch_0", "branch_1", "mean"] and [*mean["scores"]] == ["mean"]
    assert mean["scores"]["mean"]["mean_iou"] == pytest.approx(each["scores"]["mean"]["mean_iou"], abs=1e-3)
    assert mean["eval"] == each["eval"]
    assert mean["eval"]["stride"] == (32, 43) and mean["eval"]["average"]


def test_voc_masks_contain_ids_and_the_official_colors(tmp_path):
    from cps_hf.data.voc import NAMES

    root = write_object_scenes(tmp_path / "set", num_train=1, num_val=2, progress=False)
    folder = tiny_branch(tmp_path / "branch", 21, names=NAMES)
    run(tmp_path, "--branches", folder, "--dataset", "voc", "--data_root", root, "--export", "voc")
    masks = sorted((tmp_path / "out" / "predictions").iterdir())
    assert len(masks) == 2
    network, images = predict_by_hand(folder), root / "VOCdevkit" / "VOC2012" / "JPEGImages"
    for path in masks:
        mask, expected = Image.open(path), network(images / f"{path.stem}.jpg").argmax(1)[0].numpy()
        assert mask.mode == "P"
        np.testing.assert_array_equal(np.asarray(mask), expected)
        colors = np.array([voc_color(i) for i in range(21)])[expected]
        np.testing.assert_array_equal(np.asarray(mask.convert("RGB")), colors)


def test_a_set_without_labels_is_predicted_and_not_scored(streets, street_branches, tmp_path, capsys):
    words = ("--branches", street_branches[0], "--dataset", "cityscapes", "--data_root", streets)
    words += ("--load_options", '{"with_labels": false}')
    results = run(tmp_path, *words, "--export", "cityscapes")
    assert "scores" not in results and len([*(tmp_path / "out" / "predictions").iterdir()]) == 3
    with pytest.raises(SystemExit):
        run(tmp_path, *words)
    assert "'val' has no labels to score against. Add `--export`" in capsys.readouterr().err


def test_a_foreign_model_uses_its_processor_and_label_resolution(tmp_path):
    folder, root = tmp_path / "segformer", tmp_path / "world"
    torch.manual_seed(0)
    config = SegformerConfig(num_labels=3, depths=[1] * 4, hidden_sizes=[8, 8, 16, 16], num_attention_heads=[1] * 4)
    SegformerForSemanticSegmentation(config).save_pretrained(folder)
    SegformerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)  # distorts, like the library's
    dataset = write_world(root, [(40, 56), (51, 33)])
    network, metric = predict_by_hand(folder), MeanIoU(num_labels=3)
    for row in dataset:
        path = root / f"{row['id'].split('-')[1]}.png"
        metric.add_batch(predictions=network(path).argmax(1), references=np.asarray(row["label"])[None])
    dataset.to_parquet(tmp_path / "val-00000-of-00001.parquet")
    words = ("--branches", folder, "--dataset", "hub", "--data_root", tmp_path)
    results = run(tmp_path, *words)
    assert results["scores"]["branch_0"]["mean_iou"] == pytest.approx(metric.compute()["mean_iou"])
    streamed = run(tmp_path, *words, "--streaming")
    assert streamed["scores"] == results["scores"]
    own = run(tmp_path, *words, "--own_size")
    assert own["scores"] != results["scores"]


def test_processors_may_differ_between_the_branches_of_an_ensemble(tmp_path):
    models = [AutoModelForSemanticSegmentation.from_config(tiny_upernet()).eval() for _ in range(2)]
    processors = [
        SegformerImageProcessor(do_resize=False, image_mean=MEAN, image_std=STD),
        SegformerImageProcessor(do_resize=False, image_mean=(0.5,) * 3, image_std=(0.5,) * 3),
    ]
    image = torch.randint(256, (3, 40, 60), dtype=torch.uint8)
    found = Ensemble(models, processors, ["a", "b"], device="cpu").logits(image)
    expected = 0
    for model, (mean, std) in zip(models, ((MEAN, STD), ((0.5,) * 3, (0.5,) * 3)), strict=True):
        values = (image / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
        with torch.no_grad():
            logits = model(values[None]).logits
        expected = expected + torch.nn.functional.interpolate(logits, size=(40, 60), mode="bilinear").softmax(1) / 2
    torch.testing.assert_close(found.exp(), expected, atol=1e-5, rtol=1e-4)


def test_a_fixed_size_model_suggests_sliding_windows(tmp_path):
    config = DPTConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=8,
        backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8] * 4, fusion_hidden_size=8, num_labels=3,
        use_auxiliary_head=False, reassemble_factors=[4, 2, 1, 0.5],
    )  # fmt: skip
    model = AutoModelForSemanticSegmentation.from_config(config).eval()
    export_branch(model, tmp_path / "dpt", image_mean=MEAN, image_std=STD)
    ensemble = Ensemble.from_pretrained([tmp_path / "dpt"], device="cpu")
    image = torch.zeros(3, 40, 60, dtype=torch.uint8)
    assert ensemble.predict(image).shape == (40, 60)
    assert ensemble.predict(image, mode="sliding", crop_size=(32, 32), stride=(16, 16)).shape == (40, 60)
    with pytest.raises(ValueError, match="dpt cannot predict an image of 40 x 60 pixels.*`mode=sliding`"):
        ensemble.predict(image, own_size=True)


def test_conflicting_class_names_are_an_error(caplog):
    check_classes(["Traffic-Light", "road"], {0: "traffic light", 1: "road"}, "A and B")
    check_classes(["LABEL_0", "LABEL_1"], {0: "sky", 1: "road"}, "A and B")
    assert not caplog.records
    check_classes(["tv", "road"], {0: "tvmonitor", 1: "road"}, "A and B")
    assert "A and B name class 0 'tv' and 'tvmonitor'" in caplog.text
    with pytest.raises(ValueError, match="different classes: 2 .* and 3"):
        check_classes(["a", "b"], {0: "a", 1: "b", 2: "c"}, "A and B")
    with pytest.raises(ValueError, match="another order: class 0 is 'road' and 'sky'"):
        check_classes(["road", "sky"], {0: "sky", 1: "road"}, "A and B")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--branches", "nowhere"], "`nowhere`: no model could be read"),
        (["--mode", "sliding"], "needs `--crop_size H W`"),
        (["--crop_size", "8", "8"], "`--crop_size` requires `--mode sliding`"),
        (["--scales", "0"], "`--scales` must be one or more positive factors"),
        (["--split", "trian"], "must be one of train, val, test, train_extra, got 'trian'"),
        (["--load_options", "{"], "`--load_options` must be JSON, found '{'"),
        (["--load_options", '{"color": 1}'], "load_cityscapes has no argument 'color'"),
        (["--data_root", "nowhere"], "No folder nowhere"),
        (["--data_root", str(Path(__file__).parent), "--dataset", "street_scenes"], "add `--dataset folder`"),
        (["--data_root", "no/folder", "--dataset", "street_scenes"], "`--data_root` no/folder is not a folder here"),
        (["--mode", "sliding", "--crop_size", "8", "8", "--stride", "9", "9"], "must not exceed"),
        (["--window_batch_size", "0"], "`--window_batch_size` must be at least 1, got 0"),
        (["--num_pictures", "-3"], "`--num_pictures` must be 0 or more, got -3"),
        (["--device", "cudda"], r"`--device` 'cudda' cannot be used here: .* Give `cpu`"),
        (["--device", "cuda:99"], r"`--device` 'cuda:99' cannot be used here: .* a GPU is used if there is one"),
    ],
)
def test_a_mistake_ends_with_one_line(streets, street_branches, tmp_path, capsys, words, said):
    usual = {"--branches": street_branches[0], "--dataset": "cityscapes", "--data_root": streets}
    given = [*words, *(word for option, value in usual.items() if option not in words for word in (option, value))]
    with pytest.raises(SystemExit) as exit_:
        run(tmp_path, *given)
    message = capsys.readouterr().err
    assert exit_.value.code == 2 and re.search(said, message) and "Traceback" not in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["results.json", "config.yaml", "checkpoint-4/manifest.json"])
def test_a_training_run_folder_is_never_overwritten(streets, street_branches, tmp_path, capsys, name):
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text('{"final": {"branch_0": {"mean_iou": 0.5}}}')
    with pytest.raises(SystemExit):
        run(tmp_path, "--branches", street_branches[0], "--dataset", "cityscapes", "--data_root", streets)
    said = capsys.readouterr().err
    assert re.search(rf"out` contains a training run.*{name.partition('/')[0]}.*Choose another folder", said)
    assert [p for p in (tmp_path / "out").rglob("*") if p.is_file()] == [path] and "final" in path.read_text()


def test_a_disk_error_names_the_path_after_the_scores_are_printed(streets, street_branches, tmp_path, capsys):
    words = ("--branches", street_branches[0], "--dataset", "cityscapes", "--data_root", streets)
    (tmp_path / "out").write_text("a file")
    with pytest.raises(SystemExit):
        run(tmp_path, *words)
    printed = capsys.readouterr()
    assert re.fullmatch(r"error: \S*/out: expected a folder, found a file.*\n", printed.err.rpartition("\r")[2])
    assert "boundary IoU" not in printed.out, "reported before the work"
    (tmp_path / "out").unlink()
    (tmp_path / "out" / "pictures").mkdir(parents=True)
    with full_disk(tmp_path / "out" / "pictures" / "confusion_matrix.png"), pytest.raises(SystemExit):
        run(tmp_path, *words)
    printed = capsys.readouterr()
    assert re.search(r"error: \S*/out: No space left on device\.\n$", printed.err) and "Traceback" not in printed.err
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert f"{100 * results['scores']['branch_0']['mean_iou']:.2f}" in printed.out and "boundary IoU" in printed.out
    assert not [*(tmp_path / "out" / "pictures").glob(".*")]
    run(tmp_path, *words)  # its own output folder may be written again
    assert (tmp_path / "out" / "pictures" / "worst.png").is_file()


def test_branches_that_do_not_fit_are_an_error(streets, street_branches, tmp_path, capsys):
    three, bare = tiny_branch(tmp_path / "three", 3), tmp_path / "bare"
    toy_models(1)[0].save_pretrained(bare)
    data = ("--dataset", "cityscapes", "--data_root", streets)
    for words, said in (
        ((three,), r"labels and \S*three have different classes: 19 .* and 3"),
        ((street_branches[0], three), r"different classes: 3 .* and 19"),
        ((three, "--load_options", '{"with_labels": false}', "--export", "cityscapes"), "`--export cityscapes` and"),
    ):
        with pytest.raises(SystemExit):
            run(tmp_path, "--branches", *words, *data)
        assert re.search(said, capsys.readouterr().err)
    processorless = tmp_path / "no_processor"
    AutoModelForSemanticSegmentation.from_pretrained(three).save_pretrained(processorless)
    with pytest.raises(ValueError, match=r"no_processor`: no image processor \(preprocessor_config.json\)"):
        Ensemble.from_pretrained([processorless])


def test_files_are_written_whole_and_inside_their_folder(tmp_path):
    ids = np.array([[0, 18, 255], [13, 10, 0]], np.uint8)
    write_label_ids(tmp_path / "deep" / "a.png", ids)
    assert np.asarray(Image.open(tmp_path / "deep" / "a.png")).tolist() == [[7, 33, 0], [26, 23, 7]]
    write_mask(tmp_path / "b.png", ids, [(i, 2 * i, 3 * i) for i in range(19)])
    mask = Image.open(tmp_path / "b.png")
    assert np.asarray(mask).tolist() == ids.tolist() and mask.convert("RGB").getpixel((1, 0)) == (18, 36, 54)
    assert mask.convert("RGB").getpixel((2, 0)) == (255, 255, 255)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.png", "deep"]
    assert output_path(tmp_path, "city/a", ".png") == tmp_path / "city" / "a.png"
    for name in ("../a", "/etc/a", "x/../../a"):
        with pytest.raises(ValueError, match="leads outside"):
            output_path(tmp_path, name, ".png")
