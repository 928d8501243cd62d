"""Self-training in three stages: train on the labels, label the unlabeled images, train again on both.

    accelerate launch examples/self_training.py
        on the drawn street scenes, 12 labeled images of 400.

    accelerate launch examples/self_training.py --teacher outputs/train_cps/branch_0 outputs/train_cps/branch_1 \\
        --output_dir outputs/cps_then_st
        only the second and third stage: the labels come from trained networks, e.g. a CPS pair.

It takes the options of `cps-hf train`; `--objective` applies to the third stage. With `fixed_teacher`, the default,
new branches learn the labels on strong views with CutMix (`--num_branches 1` trains a single one). With `supervised`,
as in the paper, the pseudo labels count as labels. With any other objective they do too, and it also sees the
unlabeled images (`cps`: section 4.5 of the paper). Hard labels are made once, for whole images or in windows,
according to `--eval_mode`. To label each crop during training, hard or soft, use `cps-hf train --objective
fixed_teacher --labelers ...`.

OUT contains the first stage's run (`labeling/`), a data set of labels with their softmax confidence
(`pseudo_labels/`), `contact_sheet.png`, and the third stage's run. Running the same command again resumes it.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import concatenate_datasets

from cps_hf import Supervised
from cps_hf.checkpointing.checkpoints import newest_checkpoint
from cps_hf.commands import train
from cps_hf.commands.datasets import TrainingSets, load_data
from cps_hf.commands.errors import user_errors
from cps_hf.commands.settings import Settings
from cps_hf.inference.ensemble import Ensemble
from cps_hf.inference.windows import check_options, default_stride
from cps_hf.training.labelers import check_sources
from cps_hf.training.self_training import contact_sheet, label_dataset, with_pseudo_labels


@dataclass(kw_only=True)
class SelfTrainingConfig:
    """The options that this script adds.

    Self-training
        teacher: networks that label with the mean of their probabilities: folders of branches, or Hub ids. By default,
            the first stage trains them on the labels.
        first_stage_labelers: which of the first stage's networks label, e.g. branch_0 branch_0_average (with
            `ema_decay`). By default, all of its branches. Only without `teacher`.
        pseudo_label_flip: average the predictions for the image and its mirror image.
        pseudo_label_scales: average the predictions for the image at these scales.
        pseudo_label_threshold: pixels with a lower confidence are ignored. With 0, as in the paper, none are.
    """

    teacher: list[str] = field(default_factory=list)
    first_stage_labelers: list[str] = field(default_factory=list)
    pseudo_label_flip: bool = True
    pseudo_label_scales: list[float] = field(default_factory=lambda: [1.0])
    pseudo_label_threshold: float = 0.0


@dataclass(kw_only=True)
class SelfTrainingSettings(Settings):
    """The groups of `cps-hf train`, and one more, whose fields are options too."""

    self_training: SelfTrainingConfig


def main(argv: Sequence[str]) -> dict[str, Any]:
    description = __doc__.split("\n")[0].removesuffix(".")
    settings = train.parse(argv, SelfTrainingSettings, default_objective="fixed_teacher", description=description)
    with user_errors(settings.args.output_dir, train.USER_ERRORS):
        is_main = train.join_processes(settings.args.ddp_timeout)
        results, settings, names = train_in_stages(settings)
    if is_main:
        train.report(results, settings, names)
    return results


def train_in_stages(settings: SelfTrainingSettings) -> tuple[dict[str, Any], SelfTrainingSettings, list[str]]:
    """Return the contents of results.json, the last stage's settings, and the class names."""
    args, data, own = settings.args, settings.data, settings.self_training
    state, output_dir = PartialState(), Path(args.output_dir)
    if data.smoke or data.streaming:
        raise ValueError("Self-training needs a data set that is not streamed, and has no `--smoke`.")
    if getattr(settings.objective, "labelers", None):
        raise ValueError(
            "`--labelers` label during training, and here labels are made before it: name the networks by "
            "`--teacher`, or train by `cps-hf train`."
        )
    check_sources(own.teacher, option="teacher")
    options = labeling_options(settings)
    if args.overwrite_output_dir and not own.teacher and state.is_main_process:
        for stage in ("labeling", "pseudo_labels"):
            shutil.rmtree(output_dir / stage, ignore_errors=True)
    state.wait_for_everyone()
    sets = load_data(data)
    if sets.unlabeled is None:
        raise ValueError(f"`partition={data.partition}` leaves no image unlabeled: there is nothing to label.")

    # train
    teachers = own.teacher or train_labeling_networks(settings, sets)

    # label the unlabeled images
    network, folder = Ensemble.from_pretrained(teachers, device=state.device), output_dir / "pseudo_labels"
    label_dataset(
        network,
        sets.unlabeled,
        folder,
        label_feature=sets.labeled.features["label"],
        process_index=state.process_index,
        num_processes=state.num_processes,
        num_workers=args.dataloader_num_workers,
        progress=state.is_main_process and not args.disable_tqdm,
        **options,
    )
    state.wait_for_everyone()
    if state.is_main_process:
        contact_sheet(sets.unlabeled, folder, output_dir / "contact_sheet.png")

    # train again on both
    with state.main_process_first():  # fills the cache of `datasets`
        sets = both_sets(settings, sets, folder)
    if args.resume_from_checkpoint is None and not args.overwrite_output_dir:
        settings = settings.with_values(resume_from_checkpoint=newest_checkpoint(output_dir) is not None or None)
    trainer, settings = train.build(settings, sets)
    return trainer.train(), settings, [*trainer.id2label.values()]


def labeling_options(settings: SelfTrainingSettings) -> dict[str, Any]:
    """Options of `Ensemble.logits` for labeling: images keep their size; the mode is the evaluation's."""
    own, evaluation = settings.self_training, settings.evaluation
    options: dict[str, Any] = {"flip": own.pseudo_label_flip, "scales": own.pseudo_label_scales}
    options["mode"] = evaluation.eval_mode
    if evaluation.eval_mode == "sliding":
        crop = tuple(evaluation.eval_crop_size or settings.augmentation.crop_size)
        options |= {"crop_size": crop, "stride": tuple(evaluation.eval_stride or default_stride(crop))}
    check_options(**options)
    return options | {"own_size": True}


def both_sets(settings: SelfTrainingSettings, sets: TrainingSets, folder: Path) -> TrainingSets:
    """The third stage's data: pseudo labels as a column of the unlabeled images, or as further labeled images."""
    threshold = settings.self_training.pseudo_label_threshold
    if "pseudo_labels" in settings.objective.views:
        options = {"confidence_threshold": threshold, "column": "pseudo_label"}
        return sets._replace(unlabeled=with_pseudo_labels(sets.unlabeled, folder, **options))
    taught = with_pseudo_labels(sets.unlabeled, folder, confidence_threshold=threshold)
    return sets._replace(labeled=concatenate_datasets([sets.labeled.select_columns(["image", "label", "id"]), taught]))


def train_labeling_networks(settings: SelfTrainingSettings, sets: TrainingSets) -> list[str]:
    """Train on the labels alone; return the folders of the networks that label, at the last step."""
    folder = Path(settings.args.output_dir) / "labeling"
    if not (folder / "results.json").is_file():
        resume = newest_checkpoint(folder) is not None or None
        first = settings.with_values(
            output_dir=str(folder), resume_from_checkpoint=resume, overwrite_output_dir=not resume
        )
        trainer, _ = train.build(dataclasses.replace(first, objective=Supervised.of(settings.objective)), sets)
        trainer.train()
    branches = sorted(path.name for path in folder.glob("branch_*") if not path.name.endswith("_average"))
    return [str(folder / name) for name in settings.self_training.first_stage_labelers or branches]


if __name__ == "__main__":
    main(sys.argv[1:])
    PartialState().destroy_process_group()
