"""From images to class maps: whole images, sliding windows, scales, flips, ensembles; and ONNX files."""

from .ensemble import Ensemble, check_classes
from .onnx import OnnxExport, export_onnx, onnx_predictor
from .windows import (
    add_probabilities,
    as_logits_fn,
    check_options,
    class_ids,
    default_stride,
    predict,
    predict_each,
    predict_logits,
)

__all__ = [
    "Ensemble",
    "OnnxExport",
    "add_probabilities",
    "as_logits_fn",
    "check_classes",
    "check_options",
    "class_ids",
    "default_stride",
    "export_onnx",
    "onnx_predictor",
    "predict",
    "predict_each",
    "predict_logits",
]
