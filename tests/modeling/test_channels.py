"""A model with one or four channels is rejected with that number, wherever it is used."""

import pytest
from support.toy import tiny_upernet
from transformers import AutoModelForSemanticSegmentation, SegformerConfig

from cps_hf.inference.ensemble import Ensemble
from cps_hf.modeling.channels import check_channels


def segformer(channels):
    sizes = {"hidden_sizes": [8, 8, 16, 16], "depths": [1] * 4, "num_attention_heads": [1, 1, 2, 2]}
    return SegformerConfig(num_channels=channels, decoder_hidden_size=16, **sizes)


def upernet(channels):
    config = tiny_upernet()
    config.backbone_config.num_channels = channels
    return config


@pytest.mark.parametrize("make", [segformer, upernet])
@pytest.mark.parametrize("channels", [1, 4])
def test_a_model_that_is_not_rgb_is_rejected_with_its_channels(make, channels):
    model = AutoModelForSemanticSegmentation.from_config(make(channels))
    said = rf"it takes images of {channels} channels? \(`num_channels`\).*`num_channels=3`"
    with pytest.raises(ValueError, match=said):
        check_channels(model.config, "it")
    with pytest.raises(ValueError, match=said):
        Ensemble([model], [None], ["it"])


@pytest.mark.parametrize("make", [segformer, upernet])
def test_rgb_is_accepted(make):
    check_channels(AutoModelForSemanticSegmentation.from_config(make(3)).config, "it")
