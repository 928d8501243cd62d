"""A state dict with the CPS release's names, and its network written out in plain torch with these names."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForSemanticSegmentation

from cps_hf.modeling import Branch, from_torchsemiseg

NUM_LABELS = 5
BLOCKS = {"layer1": 3, "layer2": 4, "layer3": 6, "layer4": 3}  # ResNet-50


def released_state_dict(prefix="", num_labels=NUM_LABELS):
    """Random weights and statistics of both branches, under the release's names."""
    generator = torch.Generator().manual_seed(0)
    state = {}

    def conv(name, out_channels, in_channels, size):
        fan_in = in_channels * size**2
        weight = torch.randn(out_channels, in_channels, size, size, generator=generator) * (2 / fan_in) ** 0.5
        state[f"{name}.weight"] = weight

    def norm(name, channels):
        state[f"{name}.weight"] = torch.rand(channels, generator=generator) * 0.5 + 0.25
        state[f"{name}.bias"] = torch.randn(channels, generator=generator) * 0.1
        state[f"{name}.running_mean"] = torch.randn(channels, generator=generator) * 0.1
        state[f"{name}.running_var"] = torch.rand(channels, generator=generator) + 0.5
        state[f"{name}.num_batches_tracked"] = torch.tensor(7)

    for branch in ("branch1", "branch2"):
        backbone = f"{prefix}{branch}.backbone"
        for index, (out_channels, in_channels) in {0: (64, 3), 3: (64, 64), 6: (128, 64)}.items():
            conv(f"{backbone}.conv1.{index}", out_channels, in_channels, 3)
        norm(f"{backbone}.conv1.1", 64)
        norm(f"{backbone}.conv1.4", 64)
        norm(f"{backbone}.bn1", 128)
        in_channels = 128
        for stage, (layer, blocks) in enumerate(BLOCKS.items()):
            width = 64 * 2**stage
            for block in range(blocks):
                name = f"{backbone}.{layer}.{block}"
                for index, (out, into, size) in enumerate(
                    ((width, in_channels, 1), (width, width, 3), (4 * width, width, 1)), start=1
                ):
                    conv(f"{name}.conv{index}", out, into, size)
                    norm(f"{name}.bn{index}", out)
                if block == 0:
                    conv(f"{name}.downsample.0", 4 * width, in_channels, 1)
                    norm(f"{name}.downsample.1", 4 * width)
                in_channels = 4 * width
        aspp = f"{prefix}{branch}.head.aspp"
        for index in range(4):
            conv(f"{aspp}.map_convs.{index}", 256, 2048, 1 if index == 0 else 3)
        norm(f"{aspp}.map_bn", 1024)
        conv(f"{aspp}.global_pooling_conv", 256, 2048, 1)
        norm(f"{aspp}.global_pooling_bn", 256)
        conv(f"{aspp}.red_conv", 256, 1024, 1)
        conv(f"{aspp}.pool_red_conv", 256, 256, 1)
        norm(f"{aspp}.red_bn", 256)
        head = f"{prefix}{branch}.head"
        conv(f"{head}.reduce.0", 48, 256, 1)
        norm(f"{head}.reduce.1", 48)
        conv(f"{head}.last_conv.0", 256, 304, 3)
        norm(f"{head}.last_conv.1", 256)
        conv(f"{head}.last_conv.3", 256, 256, 3)
        norm(f"{head}.last_conv.4", 256)
        conv(f"{prefix}{branch}.classifier", num_labels, 256, 1)
        state[f"{prefix}{branch}.classifier.bias"] = torch.randn(num_labels, generator=generator)
    return state


def released_network(state, images):
    """The release's DeepLabV3+ of one branch at output stride 16 in evaluation mode, (B, C, H, W) at input size."""

    def conv(x, name, **how):
        return F.conv2d(x, state[f"{name}.weight"], state.get(f"{name}.bias"), **how)

    def norm(x, name):
        mean, variance, weight, bias = (
            state[f"{name}.{key}"].view(1, -1, 1, 1) for key in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (variance + 1e-5).sqrt() * weight + bias

    x = F.relu(norm(conv(images, "backbone.conv1.0", stride=2, padding=1), "backbone.conv1.1"))
    x = F.relu(norm(conv(x, "backbone.conv1.3", padding=1), "backbone.conv1.4"))
    x = F.relu(norm(conv(x, "backbone.conv1.6", padding=1), "backbone.bn1"))
    x = F.max_pool2d(x, 3, stride=2, padding=1)
    maps = []
    for layer, blocks in BLOCKS.items():
        for block in range(blocks):
            name = f"backbone.{layer}.{block}"
            stride = 2 if block == 0 and layer in ("layer2", "layer3") else 1
            dilation = 2 ** (block + 1) if layer == "layer4" else 1  # 2, 4, 8
            shortcut = x
            if block == 0:
                shortcut = norm(conv(x, f"{name}.downsample.0", stride=stride), f"{name}.downsample.1")
            y = F.relu(norm(conv(x, f"{name}.conv1"), f"{name}.bn1"))
            y = F.relu(
                norm(conv(y, f"{name}.conv2", stride=stride, padding=dilation, dilation=dilation), f"{name}.bn2")
            )
            x = F.relu(norm(conv(y, f"{name}.conv3"), f"{name}.bn3") + shortcut)
        maps.append(x)
    aspp = "head.aspp"
    pyramid = [conv(x, f"{aspp}.map_convs.0")]
    pyramid += [conv(x, f"{aspp}.map_convs.{i}", padding=6 * i, dilation=6 * i) for i in (1, 2, 3)]
    pyramid = conv(F.leaky_relu(norm(torch.cat(pyramid, 1), f"{aspp}.map_bn"), 0.01), f"{aspp}.red_conv")
    pooled = conv(x.mean((2, 3), keepdim=True), f"{aspp}.global_pooling_conv")
    pooled = conv(F.leaky_relu(norm(pooled, f"{aspp}.global_pooling_bn"), 0.01), f"{aspp}.pool_red_conv")
    x = F.leaky_relu(norm(pyramid + pooled, f"{aspp}.red_bn"), 0.01)
    low = F.relu(norm(conv(maps[0], "head.reduce.0"), "head.reduce.1"))
    x = torch.cat([F.interpolate(x, size=low.shape[2:], mode="bilinear", align_corners=True), low], 1)
    x = F.relu(norm(conv(x, "head.last_conv.0", padding=1), "head.last_conv.1"))
    x = F.relu(norm(conv(x, "head.last_conv.3", padding=1), "head.last_conv.4"))
    return F.interpolate(conv(x, "classifier"), size=images.shape[2:], mode="bilinear", align_corners=True)


@pytest.fixture(scope="module")
def released():
    return released_state_dict()


@pytest.mark.parametrize("branch", [1, 2])
def test_a_converted_branch_has_the_logits_of_the_release(released, branch):
    model = from_torchsemiseg(released, branch=branch, num_labels=NUM_LABELS).double()
    images = torch.randn(1, 3, 81, 113, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    own = {
        name.removeprefix(f"branch{branch}."): tensor.double()
        for name, tensor in released.items()
        if name.startswith(f"branch{branch}.")
    }
    expected = released_network(own, images)
    logits = Branch(model)(images)
    assert expected.std() > 0.1  # not a comparison of constants
    assert torch.allclose(logits.double(), expected, atol=1e-4 * expected.abs().max().item())
    assert not model.training


def test_prefixes_and_missing_batch_counts_are_handled(released):
    renamed = {f"module.{name}": tensor for name, tensor in released.items() if "num_batches" not in name}
    model = from_torchsemiseg({"model": renamed, "epoch": 3}, num_labels=NUM_LABELS)
    weight = model.decode_head.classifier.weight
    assert torch.equal(weight, released["branch1.classifier.weight"])
    nested = {f"module.model.{name}": tensor for name, tensor in released.items()}
    assert torch.equal(from_torchsemiseg(nested, num_labels=NUM_LABELS).decode_head.classifier.weight, weight)


def without(state, name):
    return {key: tensor for key, tensor in state.items() if key != name}


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda state: without(state, "branch1.head.aspp.red_conv.weight"),
            "1 weights are missing.*pyramid.projection",
        ),
        (lambda state: {**state, "branch1.backbone.fc.bias": torch.zeros(3)}, "1 are unknown.*backbone.fc.bias"),
        (lambda state: {**state, "branch1.extra": torch.zeros(3)}, "1 are unknown.*branch1.extra"),
        (lambda state: {**state, "branch1.classifier.bias": torch.zeros(9)}, r"shape \(9,\).*num_labels=5"),
        (lambda state: {f"other.{name}": tensor for name, tensor in state.items()}, "no weight of `branch1`"),
        (
            lambda state: {name: tensor for name, tensor in state.items() if "layer3.5" not in name},
            "Stage 3 of the backbone has 5 blocks",
        ),
    ],
)
def test_a_mismatched_state_dict_is_an_error(released, change, message):
    with pytest.raises(ValueError, match=message):
        from_torchsemiseg(change(released), num_labels=NUM_LABELS)


def test_wrong_arguments_are_errors(released):
    with pytest.raises(ValueError, match="`branch` must be 1 or 2, got 0"):
        from_torchsemiseg(released, branch=0)
    with pytest.raises(ValueError, match=r"shape \(5, 256, 1, 1\) in the checkpoint; expected \(21, 256, 1, 1\)"):
        from_torchsemiseg(released)
    with pytest.raises(ValueError, match="names 2 classes, `num_labels` is 5"):
        from_torchsemiseg(released, num_labels=NUM_LABELS, id2label={0: "a", 1: "b"})


@pytest.mark.slow
def test_the_script_writes_a_folder_that_transformers_loads(released, tmp_path):
    torch.save({"model": released, "iteration": 9}, tmp_path / "epoch-last.pth")
    root = Path(__file__).parents[2]
    script, environment = root / "examples" / "convert_checkpoint.py", {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, str(script), "epoch-last.pth", "out", "--num_labels", str(NUM_LABELS), "--branch", "2"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.decode_head.classifier.bias, released["branch2.classifier.bias"])
    modes = {path.name: path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert modes["model.safetensors"] == modes["preprocessor_config.json"], "who may read one may read the other"
    (tmp_path / "text.pth").write_text("no checkpoint")
    command[2] = "text.pth"
    failed = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert failed.returncode == 1 and "text.pth" in failed.stderr and "Traceback" not in failed.stderr
