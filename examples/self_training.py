"""Self-training in three stages: train on the labels, label the unlabeled images, train anew on both.

    accelerate launch examples/self_training.py
        on the drawn street scenes, 12 labeled images of 400.

    accelerate launch examples/self_training.py --teacher outputs/train_cps/branch_0 --output_dir outputs/cps_then_st
        the second and third stage alone: the labels come from a trained network, e.g. a CPS branch.

Further options are those of train_cps.py; `--objective` (default: supervised) is the third stage's. In OUT:
`labeling/`, the first stage's run, whose branch 0 at the last step labels; `pseudo_labels/`, a data set of labels with
their soft-max confidence, and `contact_sheet.png`; and the third stage's run. The same command again goes on where it
stopped.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import train_cps  # the file beside this one
from accelerate import PartialState
from datasets import concatenate_datasets
from train_cps import TrainArguments

from cps_hf import Objective, Supervised
from cps_hf.checkpointing.checkpoints import newest_checkpoint
from cps_hf.inference.ensemble import Ensemble
from cps_hf.training.failures import one_line
from cps_hf.training.self_training import contact_sheet, label_dataset, with_pseudo_labels


@dataclass(kw_only=True)
class SelfTrainingArguments(TrainArguments):
    """What this script adds.

    Self-training
        teacher: who labels: a branch's folder or Hub id; none: a network that the first stage trains on the labels.
        pseudo_label_threshold: pixels that it is less sure of are ignored; 0, as in the paper: none.
    """

    teacher: str | None = None
    pseudo_label_threshold: float = 0.0


def main(argv: list[str] | None = None) -> dict:
    description = __doc__.split("\n")[0]
    args, objective = train_cps.parse(
        argv, SelfTrainingArguments, default_objective="supervised", description=description
    )
    try:
        is_main = train_cps.join_processes(args.ddp_timeout)
        results, names = train_in_stages(args, objective)
    except train_cps.MENDABLE as error:
        print(f"error: {one_line(error, args.output_dir)}", file=sys.stderr)
        sys.exit(2)
    if is_main:
        train_cps.report(results, args, names)
    return results


def train_in_stages(args: SelfTrainingArguments, objective: Objective) -> tuple[dict, list[str]]:
    """Everything but the printing; what results.json holds, and the classes' names."""
    state, output_dir = PartialState(), Path(args.output_dir)
    if args.smoke or args.streaming:
        raise ValueError("Self-training needs a data set that is not streamed, and has no `--smoke`.")
    if args.overwrite_output_dir and args.teacher is None and state.is_main_process:
        for stage in ("labeling", "pseudo_labels"):
            shutil.rmtree(output_dir / stage, ignore_errors=True)
    state.wait_for_everyone()
    labeled, unlabeled, evaluation, chosen = data = train_cps.load_data(args)
    if unlabeled is None:
        raise ValueError(f"`partition={args.partition}` leaves no image unlabeled: there is nothing to label.")

    # train
    teacher = args.teacher or str(train_labeling_network(args, objective, data))

    # label the unlabeled images
    network, folder = Ensemble.from_pretrained([teacher], device=state.device), output_dir / "pseudo_labels"
    label_dataset(
        network,
        unlabeled,
        folder,
        label_feature=labeled.features["label"],
        process_index=state.process_index,
        num_processes=state.num_processes,
        num_workers=args.dataloader_num_workers,
        progress=state.is_main_process and not args.disable_tqdm,
        own_size=True,
    )
    state.wait_for_everyone()
    if state.is_main_process:
        contact_sheet(unlabeled, folder, output_dir / "contact_sheet.png")
    with state.main_process_first():  # who fills the cache of `datasets`
        taught = with_pseudo_labels(unlabeled, folder, confidence_threshold=args.pseudo_label_threshold)

    # train anew on both
    both = concatenate_datasets([labeled.select_columns(["image", "label", "id"]), taught])
    if args.resume_from_checkpoint is None and not args.overwrite_output_dir:
        args = replace(args, resume_from_checkpoint=newest_checkpoint(output_dir) is not None or None)
    trainer, args = train_cps.build(args, objective, (both, unlabeled, evaluation, chosen))
    return trainer.train(), [*trainer.id2label.values()]


def train_labeling_network(args: SelfTrainingArguments, objective: Objective, data) -> Path:
    """The first stage, on the labeled images alone: its branch 0 at the last step."""
    folder = Path(args.output_dir) / "labeling"
    if not (folder / "results.json").is_file():
        resume = newest_checkpoint(folder) is not None or None
        own = replace(args, output_dir=str(folder), resume_from_checkpoint=resume, overwrite_output_dir=not resume)
        loss = {f.name: getattr(objective, f.name) for f in dataclasses.fields(Supervised)}
        trainer, _ = train_cps.build(own, Supervised(**loss), data)
        trainer.train()
    return folder / "branch_0"


if __name__ == "__main__":
    main()
    PartialState().destroy_process_group()
