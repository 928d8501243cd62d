"""Branches as ONNX files: onnxruntime against PyTorch at several sizes, and the file's metadata."""

import json
import subprocess
import sys

import onnx
import pytest
import torch
import torch.nn.functional as F
from support.architectures import ARCHITECTURES
from support.toy import ID2LABEL, MEAN, STD, ToyConfig, ToyForSemanticSegmentation
from transformers import AutoModelForSemanticSegmentation, SegformerImageProcessor

from cps_hf.inference.onnx import _adaptive_pool, export_onnx, onnx_predictor

BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}
PROCESSOR = SegformerImageProcessor(do_resize=False, image_mean=MEAN, image_std=STD)


def tiny(name):
    torch.manual_seed(0)
    model = AutoModelForSemanticSegmentation.from_config(BY_NAME[name].config(id2label=ID2LABEL)).eval()
    with torch.no_grad():  # new heads have such small weights that any two would agree
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def by_hand(model, images):
    """Logits at the images' size, with only transformers and torch."""
    with torch.no_grad():
        logits = model(pixel_values=images).logits
    align_corners = getattr(model.config, "align_corners", False)
    return F.interpolate(logits, size=images.shape[-2:], mode="bilinear", align_corners=align_corners)


@pytest.mark.parametrize("name", ["deeplabv3_plus-timm", "segformer", "upernet-resnet"])
def test_onnxruntime_gives_pytorchs_logits_at_any_size_and_batch(name, tmp_path):
    model = tiny(name)
    written = export_onnx(model, PROCESSOR, tmp_path / "deep" / "a.onnx", size=(64, 80))
    assert written.dynamic and written.max_difference < 1e-4 and len({shape[1:] for shape in written.checked}) >= 4
    assert [path.name for path in written.path.parent.iterdir()] == ["a.onnx"]
    predict = onnx_predictor(written.path)
    for shape in ((1, 3, 64, 80), (3, 3, 75, 53), (2, 3, 37, 141), (1, 3, 128, 64)):
        images = torch.randn(shape)
        expected = by_hand(model, images)
        assert predict(images.numpy()) == pytest.approx(expected.numpy(), abs=1e-4 * float(expected.abs().max()))
        assert expected.std() > 1e-3


def test_the_onnx_file_is_self_contained(tmp_path):
    export_onnx(tiny("segformer"), PROCESSOR, tmp_path / "a.onnx", size=(64, 64))
    code = """
import json, sys, numpy as np, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1])
facts = session.get_modelmeta().custom_metadata_map
pixels = np.full((1, 3, 50, 70), 0.5, np.float32)
mean, std = (np.array(json.loads(facts[name]), np.float32)[:, None, None] for name in ("image_mean", "image_std"))
logits = session.run(None, {"pixel_values": (pixels - mean) / std})[0]
print(json.dumps([logits.shape, facts, "torch" in sys.modules]))
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "a.onnx"], capture_output=True, text=True)
    shape, facts, torch_was_there = json.loads(done.stdout)
    assert shape == [1, 3, 50, 70] and not torch_was_there
    assert json.loads(facts["id2label"]) == {str(k): name for k, name in ID2LABEL.items()}
    assert json.loads(facts["image_mean"]) == list(MEAN) and json.loads(facts["image_std"]) == list(STD)
    assert facts["height_and_width"] == "free" and json.loads(facts["rescale_factor"]) == pytest.approx(1 / 255)
    assert facts["architecture"] == "SegformerForSemanticSegmentation"


def test_a_model_of_one_size_is_exported_for_that_size_and_says_so(tmp_path, caplog):
    model = tiny("dpt")
    written = export_onnx(model, PROCESSOR, tmp_path / "dpt.onnx", size=(64, 64))
    assert not written.dynamic and written.size == (64, 64) and {shape[1:] for shape in written.checked} == {(64, 64)}
    assert "for images of 64 x 64 pixels only" in caplog.text
    inputs = onnx.load(written.path).graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_param or dim.dim_value for dim in inputs] == ["batch", 3, 64, 64]
    images = torch.randn(3, 3, 64, 64)
    expected = by_hand(model, images)
    assert onnx_predictor(written.path)(images.numpy()) == pytest.approx(expected.numpy(), abs=1e-5)
    with pytest.raises(ValueError, match="cannot process images of 96 x 64 pixels"):
        export_onnx(model, PROCESSOR, tmp_path / "other.onnx", size=(96, 64))


class Frozen(ToyForSemanticSegmentation):
    """Python reads the size, so a trace contains the traced image's; for `lost`, also the pixels."""

    lost = False

    def forward(self, pixel_values, labels=None, **kwargs):
        outputs = super().forward(pixel_values)
        factor = len(range(pixel_values.shape[-1])) / 100 + (float(pixel_values.mean()) if self.lost else 0)
        outputs.logits = outputs.logits * factor
        return outputs


def test_a_wrong_trace_falls_back_to_one_size(tmp_path, caplog):
    written = export_onnx(Frozen(ToyConfig(id2label=ID2LABEL)), PROCESSOR, tmp_path / "a.onnx", size=(40, 48))
    assert not written.dynamic and "onnxruntime's logits differ" in caplog.text


@pytest.mark.parametrize("kind", ["differs", "unknown operator"])
def test_a_model_that_cannot_be_exported_is_an_error_and_leaves_no_file(kind, tmp_path):
    model = Frozen(ToyConfig(id2label=ID2LABEL))
    model.lost = kind == "differs"
    if kind == "unknown operator":
        model.decode_head.register_forward_hook(
            lambda module, args, out: torch.linalg.matrix_exp(out[..., :1, :1]) + out
        )
    with pytest.raises(ValueError, match="ForSemanticSegmentation|Frozen cannot be exported to ONNX: "):
        export_onnx(model, PROCESSOR, tmp_path / "a.onnx", size=(40, 48))
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("bins", [1, 2, (3, 6), (None, 5)])
def test_pooling_by_matrices_is_torchs_adaptive_pooling(bins):
    for size in ((2, 3), (7, 5), (13, 24)):
        images = torch.randn(2, 4, *size)
        assert torch.allclose(_adaptive_pool(images, bins), F.adaptive_avg_pool2d(images, bins), atol=1e-6)
