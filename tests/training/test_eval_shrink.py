"""Large photographs are shrunk for training and evaluation, and an exported branch accepts them at full size."""

import math

import pytest
import torch
import torch.nn.functional as F
from support.toy import settings, tiny_upernet, write_world
from transformers import AutoConfig, AutoImageProcessor, AutoModelForSemanticSegmentation

from cps_hf import CPSTrainer
from cps_hf.config import EvaluationConfig
from cps_hf.data.reading import read_image
from cps_hf.data.streams import undecoded
from cps_hf.modeling import DeepLabV3PlusConfig, build_branches
from cps_hf.objectives import Supervised

SIZES = [(64, 96), (65, 97), (70, 90)]  # with and without a remainder
SHRINK = 2


def make_trainer(root, models, **fields):
    return CPSTrainer(
        models,
        objective=Supervised(),
        train_dataset=write_world(root / "labeled", SIZES),
        eval_dataset=write_world(root / "eval", SIZES, first=90),
        **settings(
            output_dir=str(root / "out"),
            max_steps=1,
            per_device_train_batch_size=2,
            crop_size=[32, 32],
            random_scale=[0.25, 1.0],
            random_scale_mode="range",
            dataloader_num_workers=0,
            disable_tqdm=True,
            num_pictures=0,
            num_branches=1,
            eval_shrink=SHRINK,
            **fields,
        ),
    )


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    root = tmp_path_factory.mktemp("shrink")
    config = DeepLabV3PlusConfig(backbone="test_resnet", head="textbook", aspp_channels=8, low_level_channels=4)
    trainer = make_trainer(root, config)
    trainer.train()
    return trainer, root / "out"


def test_an_exported_branch_predicts_whole_images_as_the_run_does(ran):
    trainer, out = ran
    model = AutoModelForSemanticSegmentation.from_pretrained(out / "branch_0").eval()
    assert model.config.input_shrink == SHRINK and trainer.models[0].config.input_shrink == 1
    processor = AutoImageProcessor.from_pretrained(out / "branch_0")
    rows = undecoded(trainer.eval_dataset, with_label=False, what="eval_dataset")
    for row, (_, ids) in zip(rows, trainer.predict(trainer.eval_dataset, branch=0), strict=True):
        image = read_image(row["image"], name="an image")
        with torch.no_grad():
            logits = model(**processor(image, return_tensors="pt", input_data_format="channels_first")).logits
        assert logits.shape[-1] == math.ceil(image.shape[-1] / SHRINK / 4)
        expected = F.interpolate(logits, size=image.shape[-2:], mode="bilinear", align_corners=False).argmax(1)[0]
        assert ids.shape == image.shape[-2:] and (ids == expected).float().mean() > 0.999  # except for ties


def test_what_the_branch_sees_is_the_mean_of_each_block_of_pixels(ran):
    trainer, _ = ran
    torch.manual_seed(0)
    images = torch.randint(0, 256, (1, 3, 5, 6), dtype=torch.uint8)
    seen = trainer.evaluator._seen(images)
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in (trainer.model_config.image_mean, trainer.model_config.image_std)
    )
    block = (images[0, :, 2:4, 4:6].float() / 255).mean((1, 2), keepdim=True)
    torch.testing.assert_close(seen[0, :, 1:2, 2:3], (block - mean) / std)
    last = (images[0, :, 4:, 0:2].float() / 255).mean((1, 2), keepdim=True)  # the mean of the remaining pixels
    torch.testing.assert_close(seen[0, :, 2:3, 0:1], (last - mean) / std)
    assert seen.shape == (1, 3, 3, 3)


def test_the_best_branch_is_not_shrunk_twice(ran):
    trainer, _ = ran
    maps = [
        torch.stack([ids.sum() for _, ids in trainer.predict(trainer.eval_dataset, branch=b)]) for b in ("best", 0)
    ]
    assert torch.equal(*maps)


def test_a_run_from_an_exported_branch_does_not_shrink_crops(ran):
    _, out = ran
    assert AutoConfig.from_pretrained(out / "branch_0").input_shrink == SHRINK
    (model,) = build_branches(str(out / "branch_0"), num_branches=1)
    assert model.config.input_shrink == 1
    for key, tensor in AutoModelForSemanticSegmentation.from_pretrained(out / "branch_0").state_dict().items():
        assert torch.equal(tensor, model.state_dict()[key])


def test_models_that_cannot_shrink_their_input_are_rejected(tmp_path):
    with pytest.raises(ValueError, match="`eval_shrink=2` is for DeepLabV3\\+.* branch 0 is a UperNet"):
        make_trainer(tmp_path, tiny_upernet())
    with pytest.raises(ValueError, match="`eval_shrink` 2 would be ignored"):
        EvaluationConfig(eval_shrink=2, eval_mode="sliding")
    with pytest.raises(ValueError, match="`input_shrink` must be at least 1"):
        DeepLabV3PlusConfig(input_shrink=0)
