"""The metric against scikit-learn's confusion matrix and against evaluate's definition, written out."""

import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import confusion_matrix
from support.processes import launch
from support.toy import run_python

from cps_hf.functional import IGNORE_INDEX
from cps_hf.metrics import mean_iou
from cps_hf.metrics.mean_iou import MeanIoU

SIZES = [(7, 11), (16, 5), (1, 1), (20, 20)]


def maps(num_labels=6, seed=0, dtype=np.uint8, missing=(4,)):
    """Maps of different sizes with ignored pixels and a class that never occurs."""
    rng = np.random.default_rng(seed)
    classes = [c for c in range(num_labels) if c not in missing]
    references = [rng.choice(classes + [255], size) for size in SIZES]
    predictions = [
        np.where(rng.random(r.shape) < 0.6, np.where(r == 255, 0, r), rng.choice(classes, r.shape)) for r in references
    ]
    return [p.astype(dtype) for p in predictions], [r.astype(dtype) for r in references]


def by_histograms(predictions, references, num_labels, ignore_index=255):
    """The definition in evaluate: histograms of intersection, prediction and label, then their ratios."""
    intersect, guess, truth = np.zeros(num_labels), np.zeros(num_labels), np.zeros(num_labels)
    for prediction, reference in zip(predictions, references, strict=True):
        keep = reference != ignore_index
        prediction, reference = prediction[keep], reference[keep]
        bins = {"bins": num_labels, "range": (0, num_labels - 1)}
        intersect += np.histogram(prediction[prediction == reference], **bins)[0]
        guess += np.histogram(prediction, **bins)[0]
        truth += np.histogram(reference, **bins)[0]
    with np.errstate(invalid="ignore"):
        iou, accuracy = intersect / (guess + truth - intersect), intersect / truth
    return {
        "mean_iou": np.nanmean(iou),
        "mean_accuracy": np.nanmean(accuracy),
        "overall_accuracy": intersect.sum() / truth.sum(),
        "per_category_iou": iou,
        "per_category_accuracy": accuracy,
    }


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.int64, np.uint16, np.uint64])
def test_keys_and_numbers_are_those_of_evaluates_definition(dtype):
    predictions, references = maps(dtype=dtype)
    scores = MeanIoU(num_labels=6).compute(predictions=predictions, references=references)
    expected = by_histograms(predictions, references, 6)
    assert set(scores) == set(expected)
    for key, value in expected.items():
        np.testing.assert_allclose(scores[key], value, err_msg=key)
    assert np.isnan(scores["per_category_iou"][4]) and not np.isnan(scores["mean_iou"])


def test_the_confusion_matrix_is_scikit_learns():
    predictions, references = maps()
    metric = MeanIoU(num_labels=6)
    for prediction, reference in zip(predictions, references, strict=True):
        metric.add(prediction=prediction, reference=reference)
    keep = [r != 255 for r in references]
    truth = np.concatenate([r[k] for r, k in zip(references, keep, strict=True)])
    guess = np.concatenate([p[k] for p, k in zip(predictions, keep, strict=True)])
    expected = confusion_matrix(truth, guess, labels=range(6))
    np.testing.assert_array_equal(metric.confusion_matrix.numpy(), expected)


def test_batches_tensors_lists_and_single_maps_add_up_alike():
    rng = np.random.default_rng(1)
    predictions, references = rng.integers(0, 3, (4, 9, 13)), rng.integers(0, 3, (4, 9, 13))
    whole = MeanIoU(num_labels=3)
    whole.add_batch(predictions=torch.from_numpy(predictions), references=torch.from_numpy(references))
    listed = MeanIoU(num_labels=3)
    listed.add_batch(predictions=list(predictions[:2]), references=list(references[:2]))
    listed.add_batch(predictions=predictions[2:].astype(np.uint8), references=references[2:])
    assert torch.equal(whole.confusion_matrix, listed.confusion_matrix)


def test_another_ignore_index_and_binary_maps():
    prediction, reference = np.array([[True, False, True]]), np.array([[1, 9, 0]])
    scores = MeanIoU(num_labels=2, ignore_index=9).compute(predictions=prediction, references=reference)
    assert scores["overall_accuracy"] == 0.5 and scores["per_category_iou"].tolist() == [0.0, 0.5]


def test_all_pixels_ignored_gives_nan():
    metric = MeanIoU(num_labels=3)
    scores = metric.compute(predictions=np.zeros((2, 2), int), references=np.full((2, 2), 255))
    assert np.isnan(scores["mean_iou"]) and np.isnan(scores["overall_accuracy"])
    assert np.isnan(MeanIoU(num_labels=3).compute()["mean_iou"])
    zeros = MeanIoU(num_labels=3).compute(nan_to_num=0.0)
    assert zeros["mean_iou"] == 0.0 and zeros["per_category_iou"].tolist() == [0, 0, 0]


@pytest.mark.parametrize(("prediction", "reference"), [(0, 33), (3, 0), (-1, 0), (0, -1), (255, 1)])
def test_a_value_that_is_not_a_class_is_named(prediction, reference):
    metric = MeanIoU(num_labels=3)
    bad = prediction if not 0 <= prediction < 3 else reference
    with pytest.raises(ValueError, match=rf"contain \[{bad}\].*\[0, 3\)"):
        metric.add_batch(predictions=np.array([[0, prediction]]), references=np.array([[0, reference]]))


def test_a_prediction_under_an_ignored_label_may_be_anything():
    metric = MeanIoU(num_labels=3)
    metric.add_batch(predictions=np.array([[0, 77]]), references=np.array([[0, 255]]))
    assert metric.compute()["overall_accuracy"] == 1.0


def test_shapes_counts_and_kinds_are_checked():
    metric = MeanIoU(num_labels=3)
    with pytest.raises(ValueError, match=r"\(2, 3\) and references \(3, 2\)"):
        metric.add_batch(predictions=np.zeros((2, 3), int), references=np.zeros((3, 2), int))
    with pytest.raises(ValueError, match="Got 2 predictions for 1 references"):
        metric.add_batch(predictions=[np.zeros((2, 3), int)] * 2, references=[np.zeros((2, 3), int)])
    with pytest.raises(ValueError, match="must be integers, found an array of float64"):
        metric.add_batch(predictions=np.zeros((2, 3)), references=np.zeros((2, 3), int))
    with pytest.raises(ValueError, match="`num_labels` is not known"):
        MeanIoU().add_batch(predictions=np.zeros((2, 3), int), references=np.zeros((2, 3), int))
    with pytest.raises(ValueError, match="already added with num_labels=3"):
        metric.add_batch(predictions=np.zeros((2, 3), int), references=np.zeros((2, 3), int))
        metric.compute(num_labels=4)
    with pytest.raises(ValueError, match="Class ids must be integers.*float32; take the arg max"):
        metric.add_batch(predictions=torch.zeros(1, 3), references=torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"must be \(3, 3\), got \(2, 2\)"):
        metric.confusion_matrix = torch.zeros(2, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="`num_labels` must be at least 1, got 0"):
        MeanIoU().compute(num_labels=0)
    for option in ({"reduce_labels": True}, {"label_map": {0: 1}}):
        with pytest.raises(ValueError, match="Map those labels before adding them"):
            metric.compute(**option)  # a map was added above


def test_label_map_and_reduce_labels_change_the_references_of_that_call():
    predictions, references = maps()
    swap = {1: 2, 2: 1, 3: 255}
    mapped = [np.choose(np.minimum(r, 6), [0, 2, 1, 255, 4, 5, 255]) for r in references]
    ours = MeanIoU(num_labels=6).compute(predictions=predictions, references=references, label_map=swap)
    np.testing.assert_allclose(ours["per_category_iou"], by_histograms(predictions, mapped, 6)["per_category_iou"])
    raised = [np.where(r == 255, 0, r.astype(int) + 1).astype(np.uint8) for r in references]
    ours = MeanIoU(num_labels=6).compute(predictions=predictions, references=raised, reduce_labels=True)
    np.testing.assert_allclose(ours["per_category_iou"], by_histograms(predictions, references, 6)["per_category_iou"])


def test_compute_resets_and_accepts_num_labels():
    metric = MeanIoU()
    first = metric.compute(predictions=[np.zeros((2, 2), int)], references=[np.zeros((2, 2), int)], num_labels=2)
    second = metric.compute(predictions=[np.zeros((2, 2), int)], references=[np.ones((2, 2), int)], num_labels=2)
    assert (first["overall_accuracy"], second["overall_accuracy"]) == (1.0, 0.0)


def test_matrices_summed_over_processes_give_the_score_of_all_images():
    predictions, references = maps()
    parts = [MeanIoU(num_labels=6) for _ in range(2)]
    for i, part in enumerate(parts):
        part.add_batch(predictions=predictions[i::2], references=references[i::2])
    parts[0].confusion_matrix = sum(part.confusion_matrix for part in parts)
    whole = MeanIoU(num_labels=6).compute(predictions=predictions, references=references)
    assert parts[0].compute()["mean_iou"] == whole["mean_iou"]


def test_stored_data_do_not_grow(tmp_path):
    metric = MeanIoU(num_labels=6, cache_dir=str(tmp_path))
    predictions, references = (np.zeros((8, 256, 512), np.int64) for _ in range(2))
    metric.add_batch(predictions=predictions, references=references)
    tracemalloc.start()
    for _ in range(20):  # 16 MiB a call
        metric.add_batch(predictions=predictions, references=references)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 2**16
    assert metric.confusion_matrix[0, 0] == 21 * predictions.size
    assert not [path for path in tmp_path.rglob("*") if path.is_file()], "maps were stored"


def test_pictures_transposed_views_and_two_kinds_of_integers_are_maps_too():
    rng = np.random.default_rng(2)
    prediction, reference = rng.integers(0, 3, (2, 9, 13), dtype=np.uint8)
    expected = MeanIoU(num_labels=3).compute(predictions=prediction, references=reference)["mean_iou"]
    pairs = [
        (Image.fromarray(prediction), [Image.fromarray(reference)]),
        (torch.from_numpy(prediction).T.contiguous().T.long(), [torch.from_numpy(reference)]),
        (prediction[:, ::-1].astype(np.int16)[:, ::-1], [reference.tolist()]),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for guess, truth in pairs:
            assert MeanIoU(num_labels=3).compute(predictions=[guess], references=truth)["mean_iou"] == expected


def test_scores_follow_written_out_formulas():
    # rows: truth 0 0 0 1 1 ., predictions 0 1 2 1 0 0; class 2 is predicted and never true, class 3 is absent
    scores = MeanIoU(num_labels=4).compute(
        predictions=np.array([[0, 1, 2], [1, 0, 0]]), references=np.array([[0, 0, 0], [1, 1, 255]])
    )
    np.testing.assert_allclose(scores["per_category_iou"], [1 / 4, 1 / 3, 0, np.nan])
    np.testing.assert_allclose(scores["per_category_accuracy"], [1 / 3, 1 / 2, np.nan, np.nan])
    assert scores["mean_iou"] == pytest.approx((1 / 4 + 1 / 3 + 0) / 3)
    assert scores["mean_accuracy"] == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert scores["overall_accuracy"] == pytest.approx(2 / 5)
    filled = MeanIoU(num_labels=4).compute(
        predictions=np.array([[0, 1, 2], [1, 0, 0]]), references=np.array([[0, 0, 0], [1, 1, 255]]), nan_to_num=-1
    )
    np.testing.assert_allclose(filled["per_category_accuracy"], [1 / 3, 1 / 2, -1, -1])
    assert filled["mean_accuracy"] == scores["mean_accuracy"], "the mean is over classes that occur"
    assert all(type(scores[key]) is float for key in ("mean_iou", "mean_accuracy", "overall_accuracy"))


@pytest.mark.slow
def test_evaluate_loads_the_file_by_its_path_without_a_network(tmp_path):
    source = Path(__file__).parents[2] / "cps_hf" / "metrics" / "mean_iou.py"
    done = run_python(
        "-c",
        "import evaluate, numpy as np, sys\n"
        f"metric = evaluate.load({str(source)!r}, num_labels=3)\n"
        "metric.add_batch(predictions=np.array([[0, 1, 2]]), references=np.array([[0, 1, 1]]))\n"
        "print(metric.compute()['mean_iou'])\n"
        "assert 'cps_hf' not in sys.modules\n",
        PYTHONPATH="",
        HF_MODULES_CACHE=str(tmp_path),
        HF_EVALUATE_OFFLINE="1",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout) == pytest.approx((1 + 0.5 + 0) / 3)


@pytest.mark.slow
def test_two_processes_give_the_score_of_all_images(tmp_path):
    predictions, references = maps()
    np.savez(tmp_path / "maps.npz", *predictions, *references)
    script = tmp_path / "score.py"
    script.write_text(
        "import numpy as np, torch.distributed as dist\n"
        "from cps_hf.metrics.mean_iou import MeanIoU\n"
        "dist.init_process_group('gloo')\n"
        "maps = [*np.load('maps.npz').values()]\n"
        "share = [slice(3), slice(3, 4)][dist.get_rank()]\n"
        "metric = MeanIoU(num_labels=6)\n"
        "metric.add_batch(predictions=maps[:4][share], references=maps[4:][share])\n"
        "total = metric.confusion_matrix\n"
        "dist.all_reduce(total)\n"
        "metric.confusion_matrix = total\n"
        "open(f'score{dist.get_rank()}', 'w').write(str(metric.compute()['mean_iou']))\n"
        "dist.destroy_process_group()\n"
    )
    done = launch(str(script), processes=2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    whole = MeanIoU(num_labels=6).compute(predictions=predictions, references=references)["mean_iou"]
    assert [float((tmp_path / f"score{rank}").read_text()) for rank in range(2)] == [whole, whole]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_valid_maps_on_a_cpu_are_counted_by_their_values(dtype, monkeypatch):
    """The other code path gives the same numbers but takes much longer, so no other test would notice its use."""
    monkeypatch.setattr(MeanIoU, "_counted_by_classes", lambda *_: pytest.fail("counted the slow way"))
    truth = torch.arange(300).remainder(20).to(dtype)
    truth[truth == 19] = 255
    guess = torch.arange(300).remainder(7).to(dtype)
    metric = MeanIoU(num_labels=19)
    metric.add_batch(predictions=guess.view(10, 30), references=truth.view(10, 30))
    expected = torch.zeros(19, 19, dtype=torch.int64)
    for one, other in zip(truth.tolist(), guess.tolist(), strict=True):
        if one != 255:
            expected[one, other] += 1
    assert torch.equal(metric.confusion_matrix, expected)


def test_what_is_ignored_is_what_the_package_ignores():
    assert mean_iou.IGNORE_INDEX == IGNORE_INDEX  # the file stands alone, so it defines the constant again
