"""Self-training in three stages: train on the labels, label the unlabeled images, train anew on both.

    accelerate launch examples/self_training.py
        on the drawn street scenes, 12 labeled images of 400.

    accelerate launch examples/self_training.py --teacher outputs/train_cps/branch_0 --output_dir outputs/cps_then_st
        the second and third stage alone: the labels come from a trained network, e.g. a CPS branch.

Further options are those of `cps-hf train`; `--objective` (default: supervised) is the third stage's. In OUT:
`labeling/`, the first stage's run, whose branch 0 at the last step labels; `pseudo_labels/`, a data set of labels with
their soft-max confidence, and `contact_sheet.png`; and the third stage's run. The same command again goes on where it
stopped.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import concatenate_datasets

from cps_hf import Supervised
from cps_hf.checkpointing.checkpoints import newest_checkpoint
from cps_hf.commands import train
from cps_hf.commands.datasets import TrainingSets, load_data
from cps_hf.commands.errors import mendable
from cps_hf.commands.settings import Settings
from cps_hf.inference.ensemble import Ensemble
from cps_hf.training.self_training import contact_sheet, label_dataset, with_pseudo_labels


@dataclass(kw_only=True)
class SelfTrainingConfig:
    """What this script adds.

    Self-training
        teacher: who labels: a branch's folder or Hub id; none: a network that the first stage trains on the labels.
        pseudo_label_threshold: pixels that it is less sure of are ignored; 0, as in the paper: none.
    """

    teacher: str | None = None
    pseudo_label_threshold: float = 0.0


@dataclass(kw_only=True)
class SelfTrainingSettings(Settings):
    """The groups of `cps-hf train`, and one more: its fields are options as all others are."""

    self_training: SelfTrainingConfig


def main(argv: Sequence[str]) -> dict[str, Any]:
    description = __doc__.split("\n")[0].removesuffix(".")
    settings = train.parse(argv, SelfTrainingSettings, default_objective="supervised", description=description)
    with mendable(settings.args.output_dir, train.MENDABLE):
        is_main = train.join_processes(settings.args.ddp_timeout)
        results, settings, names = train_in_stages(settings)
    if is_main:
        train.report(results, settings, names)
    return results


def train_in_stages(settings: SelfTrainingSettings) -> tuple[dict[str, Any], SelfTrainingSettings, list[str]]:
    """Everything but the printing; what results.json holds, the last stage's settings, and the classes' names."""
    args, data, own = settings.args, settings.data, settings.self_training
    state, output_dir = PartialState(), Path(args.output_dir)
    if data.smoke or data.streaming:
        raise ValueError("Self-training needs a data set that is not streamed, and has no `--smoke`.")
    if args.overwrite_output_dir and own.teacher is None and state.is_main_process:
        for stage in ("labeling", "pseudo_labels"):
            shutil.rmtree(output_dir / stage, ignore_errors=True)
    state.wait_for_everyone()
    sets = load_data(data)
    if sets.unlabeled is None:
        raise ValueError(f"`partition={data.partition}` leaves no image unlabeled: there is nothing to label.")

    # train
    teacher = own.teacher or str(train_labeling_network(settings, sets))

    # label the unlabeled images
    network, folder = Ensemble.from_pretrained([teacher], device=state.device), output_dir / "pseudo_labels"
    label_dataset(
        network,
        sets.unlabeled,
        folder,
        label_feature=sets.labeled.features["label"],
        process_index=state.process_index,
        num_processes=state.num_processes,
        num_workers=args.dataloader_num_workers,
        progress=state.is_main_process and not args.disable_tqdm,
        own_size=True,
    )
    state.wait_for_everyone()
    if state.is_main_process:
        contact_sheet(sets.unlabeled, folder, output_dir / "contact_sheet.png")
    with state.main_process_first():  # who fills the cache of `datasets`
        taught = with_pseudo_labels(sets.unlabeled, folder, confidence_threshold=own.pseudo_label_threshold)

    # train anew on both
    both = concatenate_datasets([sets.labeled.select_columns(["image", "label", "id"]), taught])
    if args.resume_from_checkpoint is None and not args.overwrite_output_dir:
        settings = settings.with_values(resume_from_checkpoint=newest_checkpoint(output_dir) is not None or None)
    trainer, settings = train.build(settings, sets._replace(labeled=both))
    return trainer.train(), settings, [*trainer.id2label.values()]


def train_labeling_network(settings: SelfTrainingSettings, sets: TrainingSets) -> Path:
    """The first stage, on the labeled images alone: its branch 0 at the last step."""
    folder = Path(settings.args.output_dir) / "labeling"
    if not (folder / "results.json").is_file():
        resume = newest_checkpoint(folder) is not None or None
        loss = {f.name: getattr(settings.objective, f.name) for f in dataclasses.fields(Supervised)}
        first = settings.with_values(
            output_dir=str(folder), resume_from_checkpoint=resume, overwrite_output_dir=not resume
        )
        trainer, _ = train.build(dataclasses.replace(first, objective=Supervised(**loss)), sets)
        trainer.train()
    return folder / "branch_0"


if __name__ == "__main__":
    main(sys.argv[1:])
    PartialState().destroy_process_group()
