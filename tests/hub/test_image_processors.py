"""What processors do to images is measured, and compared with training."""

import logging

import numpy as np
import pytest
from transformers import (
    BeitImageProcessor,
    CLIPImageProcessor,
    ConvNextImageProcessor,
    DPTImageProcessor,
    EfficientNetImageProcessor,
    MobileNetV2ImageProcessor,
    MobileViTImageProcessor,
    SegformerImageProcessor,
)

from cps_hf.hub.image_processors import check_processor, check_range, read_processor

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
HALF = [0.5] * 3
CAFFE = {"do_rescale": False, "image_mean": [123.675, 116.28, 103.53], "image_std": [58.395, 57.12, 57.375]}


def segformer(**fields):
    return SegformerImageProcessor(**{"do_resize": False, "image_mean": MEAN, "image_std": STD} | fields)


@pytest.mark.parametrize(
    ("processor", "mean", "std"),
    [
        (segformer(), MEAN, STD),
        (segformer(size={"height": 48, "width": 48}, do_resize=True), MEAN, STD),
        (segformer(do_normalize=False), [0.0] * 3, [1.0] * 3),
        (segformer(rescale_factor=1 / 127.5), [0.2425, 0.228, 0.203], [0.1145, 0.112, 0.1125]),
        (segformer(**CAFFE), MEAN, STD),  # of images in [0, 255], as other libraries write it
        (BeitImageProcessor(), HALF, HALF),
        (EfficientNetImageProcessor(), HALF, [0.25] * 3),  # rescales twice
        (EfficientNetImageProcessor(rescale_offset=True, do_normalize=False), [1.0] * 3, HALF),  # shifts too
        (MobileViTImageProcessor(), [0.0] * 3, [1.0] * 3),  # has an `image_mean` that it does not use
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_processors_numbers_are_measured(processor, mean, std):
    reading = read_processor(processor)
    assert reading.mean == pytest.approx(mean, abs=1e-5) and reading.std == pytest.approx(std, rel=1e-5)
    images = [np.full((64, 96, 3), (10, 120, 230), np.uint8)]
    made = processor(images=images, return_tensors="pt")["pixel_values"][0, :, 20, 20].numpy()
    color = np.array((230, 120, 10) if reading.swaps_colors else (10, 120, 230)) / 255
    assert np.allclose(made, (color - np.array(reading.mean)) / np.array(reading.std), atol=1e-4)


def test_fields_that_match_are_used_exactly():
    clip = read_processor(CLIPImageProcessor())
    assert clip.mean == [*CLIPImageProcessor().image_mean] and clip.std == [*CLIPImageProcessor().image_std]


@pytest.mark.parametrize(
    ("processor", "whole", "size"),
    [
        (segformer(), True, (60, 132)),
        (segformer(do_resize=True, size={"height": 33, "width": 70}), True, (33, 70)),
        (ConvNextImageProcessor(size={"shortest_edge": 384}), True, (384, 384)),
        (MobileNetV2ImageProcessor(), False, (224, 224)),  # crops the centre
        (MobileViTImageProcessor(), False, (256, 256)),
        (MobileViTImageProcessor(do_center_crop=False), True, (224, 492)),
        (DPTImageProcessor(do_resize=False, do_pad=True, size_divisor=48), False, (96, 144)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_crops_and_padding_are_detected(processor, whole, size):
    reading = read_processor(processor)
    assert (reading.whole, reading.size) == (whole, size)


class Holder:
    def __init__(self, image_processor):
        self.image_processor = image_processor


def test_nested_processors_are_read_and_others_rejected():
    assert read_processor(Holder(segformer())).mean == MEAN
    with pytest.raises(ValueError, match="The function cannot process images: TypeError"):
        read_processor(lambda text: text)
    with pytest.raises(ValueError, match=r"turns five images into \(5, 3\)"):
        read_processor(lambda images, return_tensors: {"pixel_values": __import__("torch").zeros(5, 3)})

    def grey(images, return_tensors):
        made = segformer()(images=images, return_tensors="pt")
        return {"pixel_values": made["pixel_values"].mean(1, keepdim=True).expand(-1, 3, -1, -1)}

    with pytest.raises(ValueError, match="mixes colours"):
        read_processor(grey)


def check(processor, reduces=False, model_type="segformer"):
    check_processor(processor, model_type, MEAN, STD, reduces=reduces)


@pytest.mark.parametrize(
    ("wrong", "said", "fix"),
    [
        (segformer(do_rescale=False), "do_rescale False", {"do_rescale": True}),
        (segformer(rescale_factor=1 / 127.5), "rescale_factor 0.0078", {"rescale_factor": 1 / 255}),
        (segformer(do_normalize=False), "do_normalize False", {"do_normalize": True}),
        (segformer(image_mean=HALF), r"uses mean \[0.5, 0.5, 0.5\].*training \[0.485", {"image_mean": MEAN}),
        (segformer(image_std=HALF), r"std \[0.5, 0.5, 0.5\]", {"image_std": STD}),
        (
            segformer(do_reduce_labels=True),
            "where 0 is class 0.*do_reduce_labels = False",
            {"do_reduce_labels": False},
        ),
        (
            MobileNetV2ImageProcessor(image_mean=MEAN, image_std=STD, do_resize=False),
            "crops, pads or mirrors.*do_center_crop = False",
            {"do_center_crop": False},
        ),
        (MobileViTImageProcessor(do_center_crop=False), "swaps red and blue.*do_flip_channel_order = False", None),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mismatched_processors_are_rejected_with_advice(wrong, said, fix):
    with pytest.raises(ValueError, match=f"`processing_class` .*{said}"):
        check(wrong)
    if fix is not None:
        for name, value in fix.items():
            setattr(wrong, name, value)
        check(wrong)


def test_training_with_the_processors_numbers_works():
    wrong = segformer(rescale_factor=1 / 100)
    with pytest.raises(ValueError) as error:
        check(wrong)
    image_mean, image_std = eval(str(error.value).split("`image_mean=")[1].split("`")[0].replace("image_std=", ""))
    check_processor(wrong, "segformer", image_mean, image_std)


def test_the_processor_must_reduce_labels_like_training():
    check(segformer(do_reduce_labels=True), reduces=True)
    with pytest.raises(ValueError, match="where 0 is ignored.*do_reduce_labels = True"):
        check(segformer(), reduces=True)


def test_resizing_is_reported_unless_the_model_needs_it(caplog):
    with caplog.at_level(logging.WARNING, logger="cps_hf"):
        check(segformer(do_resize=True, size={"height": 64, "width": 64}), model_type="dpt")
        assert not caplog.records
        check(segformer(do_resize=True, size={"height": 64, "width": 64}))
        assert "squashes every image to 64 x 64" in caplog.text
        check(ConvNextImageProcessor(size={"shortest_edge": 384}, image_mean=MEAN, image_std=STD, crop_pct=1.0))
    check_twice = caplog.records[-1].getMessage()
    assert "`processing_class.do_resize = False`" in check_twice


def test_implausible_ranges_are_rejected():
    with pytest.raises(ValueError, match=r"into -2.118 and 1136.*do_rescale = True"):
        check_range(read_processor(segformer(do_rescale=False)))
    check_range(read_processor(segformer(rescale_factor=1 / 127.5)))
    check_range(read_processor(segformer(**CAFFE)))
