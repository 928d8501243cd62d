"""Image and batch sizes that a model does not support are errors before a run."""

import copy

import pytest
import torch
from support.tiny_models import build, deeplab, segformer
from transformers import Data2VecVisionConfig, DPTConfig, MobileNetV2Config

from cps_hf.modeling import HRNetConfig, check_input_size, check_train_batch, convert_sync_batchnorm, freeze


def test_a_batch_of_one_is_rejected_with_image_pooling():
    model = deeplab().train()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="with 1 image per process.*command line `--per_device_train_batch_size 2`"):
        check_train_batch(model, 1)
    check_train_batch(model, 2)
    check_train_batch(segformer(), 1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    freeze(model, backbone=True)  # the head's norm is still there
    with pytest.raises(ValueError, match="image-pooled"):
        check_train_batch(model, 1)
    check_train_batch(convert_sync_batchnorm(model), 1)
    with pytest.raises(ValueError, match="MobileNetV2.*image-pooled"):
        check_train_batch(build(MobileNetV2Config(depth_multiplier=0.25)), 1)
    fixed_size = {"image_size": 48, "patch_size": 16, "hidden_size": 16, "intermediate_size": 32}
    data2vec = Data2VecVisionConfig(**fixed_size, num_hidden_layers=4, num_attention_heads=2, out_indices=[0, 1, 2, 3])
    with pytest.raises(ValueError, match="Data2Vec.*image-pooled"):
        check_train_batch(build(data2vec), 1)


def test_size_errors_name_what_is_allowed():
    hrnet = build(HRNetConfig("hrnet_w18_small"))
    with pytest.raises(
        ValueError, match="cannot process images of 769 x 769.*for instance, 768 x 768; multiples of 32"
    ):
        check_input_size(hrnet, 769, 769)
    dpt = build(
        DPTConfig(
            image_size=64,
            patch_size=16,
            hidden_size=16,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=32,
            backbone_out_indices=[0, 1, 2, 3],
            neck_hidden_sizes=[8] * 4,
            fusion_hidden_size=16,
        )
    )
    with pytest.raises(ValueError, match="for instance, 96 x 96 or 64 x 64, no oblong image"):
        check_input_size(dpt, 96, 64)
    check_input_size(dpt, 128, 128)
