"""Self-training: labels as predicted, encoded like the labeled set's, written once and joined."""

import io
import json
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, Features, Image, Value, concatenate_datasets
from PIL import Image as PILImage
from support.toy import NAMES, script, tiny_upernet, write_world
from transformers import AutoModelForSemanticSegmentation

from cps_hf import visualization
from cps_hf.commands import train
from cps_hf.config import AugmentationConfig
from cps_hf.data import load_cityscapes
from cps_hf.data.labels import LabelEncoding
from cps_hf.data.order import Shard
from cps_hf.data.streams import EvaluationStream, TrainStream
from cps_hf.hub.export import export_branch
from cps_hf.inference.ensemble import Ensemble
from cps_hf.objectives import FixedTeacher
from cps_hf.scenes.write import write_street_scenes
from cps_hf.training.self_training import contact_sheet, label_dataset, with_pseudo_labels

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    torch.manual_seed(0)
    model = AutoModelForSemanticSegmentation.from_config(tiny_upernet()).eval()
    with torch.no_grad():
        for parameter in model.decode_head.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("network")
    export_branch(model, folder / "a", image_mean=MEAN, image_std=STD)
    return Ensemble.from_pretrained([str(folder / "a")], device="cpu")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    labeled = write_world(root / "labeled", [(40, 56)] * 2)
    return labeled, write_world(root / "unlabeled", [(40, 56), (48, 32), (37, 41)], first=20, labels=False)


def label(network, world, folder, **options):
    labeled, unlabeled = world
    options = {"rows_per_shard": 2, "progress": False, **options}
    return label_dataset(network, unlabeled, folder, label_feature=labeled.features["label"], **options)


def test_pseudo_labels_are_the_arg_max_with_confidence(network, world, tmp_path):
    shards = label(network, world, tmp_path / "labels")
    assert [path.name for path in shards] == ["labels-00000-of-00002.parquet", "labels-00001-of-00002.parquet"]
    joined = with_pseudo_labels(world[1], tmp_path / "labels")
    confidences = [row["confidence"] for path in shards for row in pq.read_table(path).to_pylist()]
    for row, confidence in zip(joined, confidences, strict=True):
        image = torch.from_numpy(np.array(row["image"])).permute(2, 0, 1)
        probs = network.logits(image)[0].softmax(0)
        np.testing.assert_array_equal(np.asarray(row["label"]), probs.argmax(0).numpy())
        kept = np.asarray(PILImage.open(io.BytesIO(confidence["bytes"]))) / 255
        np.testing.assert_allclose(kept, probs.max(0).values.numpy(), atol=0.5 / 255 + 1e-6)


def test_a_pair_labels_by_its_mean_over_flips_and_scales(network, world, tmp_path):
    torch.manual_seed(3)
    other = AutoModelForSemanticSegmentation.from_config(tiny_upernet()).eval()
    with torch.no_grad():
        for parameter in other.decode_head.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    export_branch(other, tmp_path / "b", image_mean=MEAN, image_std=STD)
    folders = [network.sources[0], str(tmp_path / "b")]
    pair = Ensemble.from_pretrained(folders, device="cpu")
    label(pair, world, tmp_path / "labels", flip=True, scales=[1.0, 1.5])
    labels = [np.asarray(row["label"]) for row in with_pseudo_labels(world[1], tmp_path / "labels")]
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    for [sample], found in zip(EvaluationStream(world[1], with_label=False), labels, strict=True):
        size, total = sample["image"].shape[-2:], 0.0
        for scale in (1.0, 1.5):
            image = (sample["image"][None] / 255 - mean) / std
            image = torch.nn.functional.interpolate(
                image, size=[round(scale * side) for side in size], mode="bilinear", align_corners=False
            )
            for mirrored in (False, True):
                for model in (network.networks[0], pair.networks[1]):
                    with torch.no_grad():
                        logits = predicted(model, image.flip(-1) if mirrored else image)
                    logits = logits.flip(-1) if mirrored else logits
                    full = torch.nn.functional.interpolate(logits, size=size, mode="bilinear", align_corners=False)
                    total = total + full.softmax(1)
        assert (total[0].argmax(0).numpy() == found).mean() > 0.995  # except for ties
    alone = label(network, world, tmp_path / "alone")
    assert any(
        row["label"] != other["label"]
        for path, same_rows in zip(alone, sorted((tmp_path / "labels").glob("*.parquet")), strict=True)
        for row, other in zip(pq.read_table(path).to_pylist(), pq.read_table(same_rows).to_pylist(), strict=True)
    )


def predicted(model, image):
    """Logits at the image's size."""
    logits = (model.model if hasattr(model, "model") else model)(pixel_values=image).logits
    return torch.nn.functional.interpolate(logits, size=image.shape[-2:], mode="bilinear", align_corners=False)


def test_both_sets_join_and_uncertain_pixels_are_ignored(network, world, tmp_path):
    label(network, world, tmp_path / "labels")
    both = concatenate_datasets([world[0], with_pseudo_labels(world[1], tmp_path / "labels")])
    assert len(both) == 5 and LabelEncoding.from_feature(both.features["label"]).names == NAMES
    confidences = []
    for row in world[1]:
        image = torch.from_numpy(np.array(row["image"])).permute(2, 0, 1)
        confidences.append((network.logits(image)[0].softmax(0).max(0).values * 255).round().numpy())
    threshold = float(np.median(np.concatenate([c.flatten() for c in confidences]))) / 255
    sure = with_pseudo_labels(world[1], tmp_path / "labels", confidence_threshold=threshold)
    ignored = []
    for row, plain, confidence in zip(sure, list(both)[2:], confidences, strict=True):
        expected = np.where(confidence < threshold * 255, 255, np.asarray(plain["label"]))
        np.testing.assert_array_equal(np.asarray(row["label"]), expected)
        ignored.append((expected == 255).mean())
    assert 0.1 < np.mean(ignored) < 0.9


def test_stored_labels_are_augmented_like_their_images(network, world, tmp_path):
    """In the crop of its strong view, with 255 on padding and where the network was uncertain."""
    label(network, world, tmp_path / "labels")
    taught = with_pseudo_labels(world[1], tmp_path / "labels", column="pseudo_label", confidence_threshold=0.4)
    assert taught.column_names == ["image", "pseudo_label", "id"] and len(taught) == len(world[1])
    stored = {row["id"]: np.asarray(row["pseudo_label"]) for row in taught}
    plain = {row["id"]: np.asarray(row["image"]) for row in taught}
    augmentation = AugmentationConfig(
        crop_size=[44, 40], random_scale=[1.0], color_jitter=0.0, grayscale=0.0, gaussian_blur=0.0
    )
    stream = TrainStream(
        taught,
        name="unlabeled_dataset",
        shard=Shard(batch_size=3),
        augmentation=augmentation,
        seed=0,
        views=FixedTeacher().views,
        cutmix_masks=FixedTeacher().cutmix_masks,
        num_labels=3,
    )
    padded = flipped = 0
    for batch, index in zip(stream, range(4), strict=False):
        first = index % 2  # positions 0 and 1, 4 and 5, ... are neighbours
        ours, theirs = batch["pseudo_labels"], batch["partner_pseudo_labels"]
        assert torch.equal(theirs[[first, first + 1]], ours[[first + 1, first]])
        for i, name in enumerate(batch["ids"]):
            image, found, valid = (batch[key][i] for key in ("strong", "pseudo_labels", "valid"))
            assert (found[~valid] == 255).all()
            rows, columns = (torch.nonzero(valid.any(1 - side)).flatten() for side in (0, 1))
            shown = image[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].permute(1, 2, 0).numpy()
            here = found[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].numpy()
            matches = []
            for mirrored in (False, True):
                whole, labels = (a[:, ::-1] if mirrored else a for a in (plain[name], stored[name]))
                for top in range(whole.shape[0] - shown.shape[0] + 1):
                    for left in range(whole.shape[1] - shown.shape[1] + 1):
                        box = np.s_[top : top + shown.shape[0], left : left + shown.shape[1]]
                        if np.array_equal(whole[box], shown):
                            matches.append(np.array_equal(labels[box], here))
                            flipped += mirrored
            assert matches == [True], name
            padded += bool((~valid).any())
    assert padded and flipped and any((labels == 255).any() for labels in stored.values())


def test_labels_are_encoded_like_the_labeled_set(network, world, tmp_path):
    encoding = LabelEncoding(names=NAMES, values={7: 0, 30: 1, 31: 1, 8: 2, 0: 255})
    shards = label_dataset(
        network, world[1], tmp_path, label_feature=encoding.to_feature(), rows_per_shard=9, progress=False
    )
    joined = with_pseudo_labels(world[1], tmp_path)
    assert len(shards) == 1
    stored = np.asarray(joined[0]["label"])
    assert set(np.unique(stored)) <= {7, 30, 8}
    image = torch.from_numpy(np.array(joined[0]["image"])).permute(2, 0, 1)
    np.testing.assert_array_equal(encoding.decode(joined[0]["label"], name="x"), network.predict(image).numpy())


@pytest.mark.parametrize(
    "table", [{"values": {0: 0, 7: 1, 255: 2}}, {"colors": {(0, 0, 0): 0, (1, 2, 3): 1, (255, 255, 255): 2}}]
)
def test_uncertain_pixels_are_ignored_without_a_code_for_it(network, world, tmp_path, table):
    feature = LabelEncoding(names=NAMES, **table).to_feature()
    ids = np.array([[0, 1, 2]], np.uint8)
    image = PILImage.new("RGB", (3, 1))
    labeled = Dataset.from_dict(
        {"image": [image], "label": [LabelEncoding.from_feature(feature).encode(ids)], "id": ["a"]},
        features=Features({"image": Image(), "label": feature, "id": Value("string")}),
    )
    label_dataset(network, world[1], tmp_path, label_feature=feature, progress=False)
    confidences = [np.asarray(c) for c in Dataset.from_parquet(str(tmp_path / "*.parquet"))["confidence"]]
    threshold = float(np.median(np.concatenate([c.flatten() for c in confidences])) // 1) + 0.5
    plain, sure = (with_pseudo_labels(world[1], tmp_path, confidence_threshold=t) for t in (0, threshold / 255))
    plain, both = (EvaluationStream(d, num_labels=3) for d in (plain, concatenate_datasets([labeled, sure])))
    first, *rest = [sample["label"].numpy() for batch in both for sample in batch]
    np.testing.assert_array_equal(first, ids)
    for found, all_labels, confidence in zip(rest, (s["label"] for b in plain for s in b), confidences, strict=True):
        np.testing.assert_array_equal(found, np.where(confidence < threshold, 255, all_labels))
    assert 0.1 < np.mean([(found == 255).mean() for found in rest]) < 0.9


def test_an_interrupted_labeling_continues_where_it_stopped(network, world, tmp_path, monkeypatch):
    shards = label(network, world, tmp_path / "labels")
    first = shards[0].read_bytes()
    shards[1].unlink()
    with pytest.raises(ValueError, match="is incomplete: labels-00001-of-00002.parquet is missing"):
        with_pseudo_labels(world[1], tmp_path / "labels")
    seen, logits = [], network.logits
    monkeypatch.setattr(network, "logits", lambda image, **o: seen.append(image.shape) or logits(image, **o))
    label(network, world, tmp_path / "labels")
    assert [tuple(shape) for shape in seen] == [(3, 37, 41)]
    assert shards[0].read_bytes() == first and shards[1].is_file()


def test_labels_of_other_images_or_of_another_network_are_not_mixed(network, world, tmp_path):
    label(network, world, tmp_path / "labels")
    with pytest.raises(ValueError, match="ids_sha256"):
        label(network, (world[0], world[1].select([2, 1, 0])), tmp_path / "labels")
    with pytest.raises(ValueError, match="belong to other images"):
        with_pseudo_labels(world[1].select([0, 1]), tmp_path / "labels")
    weight = next(network.networks[0].parameters())
    before = weight.detach().clone()
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(ValueError, match="weights_sha256"):
        label(network, world, tmp_path / "labels")
    with torch.no_grad():
        weight.copy_(before)


def test_each_process_writes_its_share(network, world, tmp_path):
    label(network, world, tmp_path / "labels", rows_per_shard=1, process_index=1, num_processes=2)
    assert [path.name for path in sorted((tmp_path / "labels").glob("*.parquet"))] == ["labels-00001-of-00003.parquet"]


def test_the_contact_sheet_shows_image_label_and_confidence(network, world, tmp_path, monkeypatch):
    titles, panel = [], visualization.panel
    monkeypatch.setattr(visualization, "panel", lambda *a, **k: titles.extend(a[1]) or panel(*a, **k))
    label(network, world, tmp_path / "labels")
    contact_sheet(world[1], tmp_path / "labels", tmp_path / "sheet.png", count=2)
    assert PILImage.open(tmp_path / "sheet.png").width > 3 * 256
    assert titles == ["unlabeled image", "pseudo label", "confidence, black 0, white 1"]


@pytest.fixture(scope="module")
def streets(tmp_path_factory):
    root = tmp_path_factory.mktemp("streets") / "set"
    return write_street_scenes(root, num_train=7, num_train_extra=0, num_val=2, size=(64, 128), progress=False)


@pytest.fixture
def trained(monkeypatch):
    """The folders that are trained into, in order, and their settings."""
    found = {}
    build = train.build

    def build_and_tell(settings, sets):
        found.setdefault(settings.args.output_dir, []).append((settings, sets))
        return build(settings, sets)

    monkeypatch.setattr(train, "build", build_and_tell)
    return found


def words_for(root, out, *more):
    words = ["--dataset", "cityscapes", "--data_root", str(root), "--partition", "3", "--crop_size", "32"]
    words += ["--max_steps", "2", "--per_device_train_batch_size", "2", "--dataloader_num_workers", "0"]
    return [*words, "--num_pictures", "0", "--output_dir", str(out), *more]


@pytest.mark.slow
def test_the_three_stages_can_be_repeated(streets, tmp_path, trained):
    self_training, out = script("self_training"), tmp_path / "out"
    words = words_for(streets, out, "--objective", "supervised")
    results = self_training.main(words)
    assert [*trained] == [str(out / "labeling"), str(out)]
    assert results["num_labeled"] == 7 and results["objective"]["name"] == "Supervised"
    assert (out / "contact_sheet.png").is_file()
    manifest = json.loads((out / "pseudo_labels" / "manifest.json").read_text())
    assert manifest["rows"] == 4
    assert manifest["network"] == [str(out / "labeling" / f"branch_{index}") for index in (0, 1)]

    # Stopped in its last stage: the same command only trains that one, from its checkpoint.
    (out / "results.json").unlink()
    again = self_training.main(words)
    assert [len(calls) for calls in trained.values()] == [1, 2]
    assert again["final"]["mean"]["mean_iou"] == results["final"]["mean"]["mean_iou"]

    # From an existing network, e.g. a CPS branch
    other = words_for(streets, tmp_path / "other", "--objective", "supervised", "--teacher", str(out / "branch_1"))
    assert self_training.main(other)["num_labeled"] == 7 and [*trained][2:] == [str(tmp_path / "other")]
    assert len(load_cityscapes(streets, "train")) == 7


@pytest.mark.slow
def test_a_branch_and_its_average_label_for_a_new_network(streets, tmp_path, trained):
    """In one command; windows, scales and the flip reach the labels."""
    out = tmp_path / "out"
    labelers = ["branch_0", "branch_0_average"]
    words = words_for(streets, out, "--num_branches", "1", "--ema_decay", "0.5", "--first_stage_labelers", *labelers)
    words += ["--pseudo_label_scales", "1.0", "0.5", "--eval_mode", "sliding", "--eval_crop_size", "64"]
    results = script("self_training").main(words)
    assert [*trained] == [str(out / "labeling"), str(out)]
    assert results["num_labeled"] == 3 and results["num_unlabeled"] == 4
    assert results["objective"]["name"] == "FixedTeacher" and "branch_0" in results["final"]
    manifest = json.loads((out / "pseudo_labels" / "manifest.json").read_text())
    assert manifest["network"] == [str(out / "labeling" / name) for name in labelers]
    for said in ("'flip': True", "'scales': [1.0, 0.5]", "'mode': 'sliding'", "'crop_size': (64, 64)"):
        assert said in manifest["options"]
    [[_, sets]] = trained[str(out)]
    assert sets.unlabeled.column_names == ["image", "pseudo_label", "id"]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert any(line.get("unsupervised_loss", 0) > 0 for line in lines)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--labelers", "a/b"], "`--labelers` label during training.*name the networks by `--teacher`"),
        (["--teacher", "/nowhere/branch_0"], "`--teacher`: there is no folder /nowhere/branch_0"),
        (["--pseudo_label_scales", "0"], "`scales` must be one or more positive factors"),
    ],
)
def test_invalid_options_fail_before_training(streets, tmp_path, trained, capsys, words, said):
    with pytest.raises(SystemExit) as exit_:
        script("self_training").main(words_for(streets, tmp_path / "out", *words))
    assert exit_.value.code == 2 and re.search(said, capsys.readouterr().err) and not trained
