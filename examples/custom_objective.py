"""Your own method on one page: the labeled loss plus entropy minimisation (Grandvalet, Bengio; NIPS 2004).

    python examples/custom_objective.py

A method is a frozen dataclass of its hyper-parameters with a `__call__` method: two batches of tensors in, a loss and
named parts out. The trainer takes any `Objective` and does the rest: the loop, data, evaluation, resuming, several
processes.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

from transformers import ResNetConfig, UperNetConfig

from cps_hf import AugmentationConfig, CPSConfig, CPSTrainer, Objective, ObjectiveOutput
from cps_hf.data import load_cityscapes, partition
from cps_hf.functional import full_size
from cps_hf.objectives import ramp
from cps_hf.scenes.write import write_street_scenes
from cps_hf.training.reporting import mean_iou_in_words


@dataclass(frozen=True, kw_only=True)
class EntropyMinimization(Objective):
    """L = Ls + weight * H, with H the mean entropy, -sum_c p_c log p_c, over valid unlabeled pixels.

    Args:
        weight: of the unlabeled term.
        ramp_up: the share of training over which the weight grows to its value.
    """

    weight: float = 0.1
    ramp_up: float = 0.3

    @property
    def views(self):
        return ("weak",)  # what the unlabeled stream yields: the cropped, scaled and flipped image

    def __call__(
        self, branches, labeled, unlabeled, *, teacher=None, progress=0.0, unlabeled_weight=1.0
    ) -> ObjectiveOutput:
        supervised_loss = entropy = 0.0
        for branch in branches:
            supervised_loss = supervised_loss + self.supervised_loss(branch(labeled.pixel_values), labeled)
            # Logits are coarser than images. The losses in `cps_hf.functional` take coarse logits; for your own math,
            # resize them.
            log_probs = full_size(branch(unlabeled.weak)).log_softmax(1)
            pixelwise = -(log_probs.exp() * log_probs).sum(1)
            # Exclude padding, and divide by the global pixel count, which the trainer puts into the batch. This gives
            # the same gradient on one process, on several and with accumulation.
            entropy = entropy + (pixelwise * unlabeled.valid).sum() / unlabeled.num_pixels
        # `unlabeled_weight` is the run's factor, 1 by default (docs/unlabeled_weight.md).
        factor = self.weight * unlabeled_weight * ramp(progress, ramp_up=self.ramp_up)
        loss = supervised_loss + factor * entropy
        # Values are logged under these names: metrics.jsonl, trackers, curves. Losses are means over branches.
        parts = {"supervised_loss": supervised_loss, "entropy_loss": entropy}
        return ObjectiveOutput(loss, {name: part.detach() / len(branches) for name, part in parts.items()})


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_root", help="a folder in the Cityscapes layout; default: draw street scenes")
    parser.add_argument("--labeled", type=int, default=12, help="how many images are labeled")
    parser.add_argument("--max_steps", type=int, default=500)
    parser.add_argument("--output_dir", default="outputs/custom_objective")
    options = parser.parse_args(argv)

    root = options.data_root or write_street_scenes()
    images = load_cityscapes(root, "train")
    labeled_ids, unlabeled_ids = map(set, partition(options.labeled, images["id"]))
    stages = [f"stage{i}" for i in (1, 2, 3, 4)]
    backbone = ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 64, 96], depths=[1] * 4, layer_type="basic", out_features=stages
    )
    trainer = CPSTrainer(
        UperNetConfig(backbone_config=backbone, hidden_size=32, use_auxiliary_head=False),
        CPSConfig(
            output_dir=options.output_dir,
            max_steps=options.max_steps,
            per_device_train_batch_size=4,
            optim="adamw",
            learning_rate=4e-3,
            logging_steps=20,
            dataloader_num_workers=0,
        ),
        augmentation=AugmentationConfig(crop_size=[48, 96]),
        objective=EntropyMinimization(weight=0.1),
        train_dataset=images.filter(lambda name: name in labeled_ids, input_columns="id"),
        unlabeled_dataset=load_cityscapes(root, "train", with_labels=False).filter(
            lambda name: name in unlabeled_ids, input_columns="id"
        ),
        eval_dataset=load_cityscapes(root, "val"),
    )
    results = trainer.train()
    for row, scores in results["final"].items():
        print(f"{row}: {mean_iou_in_words(scores)}")
    return results


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:  # errors the user can fix are one line, without a traceback
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
