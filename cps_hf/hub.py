"""One branch as a folder that loads anywhere, the page that describes it, and its way to the Hub."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from importlib.resources import files
from numbers import Real
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, GitCommitInfo, HfApi, ModelCard, ModelCardData, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedModel, SegformerImageProcessor

logger = logging.getLogger(__name__)

# These take one input size only, so their images must be resized: oblong ones are refused.
_SQUARE_MODELS = ("dpt", "data2vec-vision")


def export_branch(
    model: PreTrainedModel,
    directory: str | os.PathLike,
    *,
    id2label: Mapping[int, str] | None = None,
    image_mean: Sequence[float],
    image_std: Sequence[float],
    processing_class: Any | None = None,
    card: Mapping[str, Any] | None = None,
) -> Path:
    """Write what `AutoModelForSemanticSegmentation.from_pretrained(directory)` and `pipeline` need, and no more.

    The folder is filled beside (as `tmp-<name>`) and renamed, so it is never half-written; an earlier export of the
    same name is replaced as a whole.

    Args:
        model: one bare branch (`Branch.model`), saved in its own dtype; if its architecture is one of ours, its code
            goes along.
        id2label: class names for config.json; none: the model's own.
        image_mean, image_std: of the three colours, for images in [0, 1], as in training.
        processing_class: an image processor to save; none: a `SegformerImageProcessor` that normalises and does not
            resize, unless the model takes one size only.
        card: the facts of `render_card`, to write README.md; none: no README.md. A file under "picture" is copied.

    Returns:
        The folder.

    Raises:
        ValueError: `model` is a wrapper, `id2label` has another count of classes than the model, or `directory` holds
            something that is no exported model.
    """
    directory = Path(directory)
    _check_export(model, directory, id2label)
    temporary = directory.with_name(f"tmp-{directory.name}")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a run that was killed here
    temporary.mkdir(parents=True)
    model.save_pretrained(temporary)  # not state_dict(): the names in a file may differ from those in memory
    config = _rewrite_config(temporary / "config.json", id2label)
    if processing_class is None:
        processing_class = _image_processor(model, image_mean, image_std)
    else:
        _check_processor(processing_class, model, image_mean, image_std)
    processing_class.save_pretrained(temporary)
    if card is not None:
        card = {**card, "trust_remote_code": "auto_map" in config}
        if card.get("picture"):
            source = Path(card["picture"])
            card["picture"] = source.name
            shutil.copyfile(source, temporary / source.name)
        (temporary / "README.md").write_text(render_card(card), encoding="utf-8")
    _replace_folder(temporary, directory)
    return directory


def _check_export(model: PreTrainedModel, directory: Path, id2label: Mapping[int, str] | None) -> None:
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"`export_branch` takes a bare transformers model, got {type(model).__name__}. Pass `.model` of a Branch, "
            "or `.module` of a model wrapped for several processes."
        )
    if id2label is not None and sorted(id2label) != list(range(model.config.num_labels)):
        raise ValueError(
            f"`id2label` must name the classes 0 to {model.config.num_labels - 1}, as the model has them, "
            f"got {sorted(id2label)}."
        )
    if directory.exists():
        names = sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []
        if not directory.is_dir() or (names and "config.json" not in names) or ".git" in names:
            found = ", ".join(names[:4]) or "a file"
            raise ValueError(
                f"{directory} holds something that is no exported model ({found}), and exporting would replace it. "
                "Choose a new folder."
            )


def _rewrite_config(path: Path, id2label: Mapping[int, str] | None) -> dict[str, Any]:
    """config.json with the class names and without local paths; the model in memory is left as it is."""
    config = json.loads(path.read_text(encoding="utf-8"))
    if id2label is not None:
        config["id2label"] = {str(index): id2label[index] for index in sorted(id2label)}
        config["label2id"] = {id2label[index]: index for index in sorted(id2label)}
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        if "_name_or_path" in part and (not _hub_id(part["_name_or_path"]) or Path(part["_name_or_path"]).exists()):
            del part["_name_or_path"]  # where a backbone's weights came from on this machine
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return config


def _image_processor(model: PreTrainedModel, image_mean, image_std) -> SegformerImageProcessor:
    size = None
    if model.config.model_type in _SQUARE_MODELS:
        side = getattr(model.config, "image_size", None) or model.config.backbone_config.image_size
        height, width = (side, side) if isinstance(side, int) else side
        size = {"height": height, "width": width}
    return SegformerImageProcessor(
        do_resize=size is not None,  # the default would squash every image to 512 x 512
        **({"size": size} if size else {}),
        do_rescale=True,
        do_normalize=True,
        image_mean=[float(v) for v in image_mean],
        image_std=[float(v) for v in image_std],
        do_reduce_labels=False,
    )


def _check_processor(processor: Any, model: PreTrainedModel, image_mean, image_std) -> None:
    size = getattr(processor, "size", None) or {}
    squashes = getattr(processor, "do_resize", False) and "height" in size and "width" in size
    if squashes and model.config.model_type not in _SQUARE_MODELS:
        logger.warning(
            "`processing_class` squashes every image to %s x %s, whatever its shape; training did not. "
            "Set `processing_class.do_resize = False`.",
            size["height"],
            size["width"],
        )
    for name, ours in (("image_mean", image_mean), ("image_std", image_std)):
        theirs = getattr(processor, name, None) if getattr(processor, "do_normalize", False) else None
        if theirs is None or [round(float(v), 6) for v in theirs] != [round(float(v), 6) for v in ours]:
            logger.warning(
                "`processing_class` normalises with %s %s, training with %s: the exported branch sees other numbers.",
                name,
                theirs,
                list(ours),
            )


def _replace_folder(temporary: Path, final: Path) -> None:
    """Two renames: a crash between them leaves the earlier folder whole, as `tmp-old-<name>`."""
    old = final.with_name(f"tmp-old-{final.name}")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.replace(final, old)
    os.replace(temporary, final)
    shutil.rmtree(old, ignore_errors=True)


_FACTS = (
    *("model_name", "branch", "architecture", "base_model", "license", "id2label", "trust_remote_code", "directory"),
    *("dataset_name", "partition_name", "partition_sha256", "num_labeled", "num_unlabeled", "objective"),
    *("objective_fields", "citation", "settings", "scores", "best", "step", "eval", "versions", "picture", "limits"),
)
_CITATION = """@inproceedings{chen2021cps,
  title     = {Semi-Supervised Semantic Segmentation with Cross Pseudo Supervision},
  author    = {Chen, Xiaokang and Yuan, Yuhui and Zeng, Gang and Wang, Jingdong},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  year      = {2021}
}"""


def render_card(facts: Mapping[str, Any]) -> str:
    """The model card: metadata for the Hub, and a page for people. No local path gets into it.

    Args:
        facts: all of
            model_name, branch ("branch_0", ..., "teacher"), architecture (the class), directory (the folder's name);
            base_model (a name on the Hub or None), license (an identifier or None: `push_branch` then takes the base
            model's); id2label; trust_remote_code (whether code travels along);
            dataset_name, partition_name, partition_sha256, num_labeled, num_unlabeled (each may be None);
            objective (its name), objective_fields, citation (BibTeX, may be empty), settings, step, versions: dicts
            of what to print; eval: {"mode": ..., further options};
            scores: network -> {"mean_iou", "per_category_iou", ...}, fractions, at the last step; best: the same at
            the best step, with "step" and "branch", or empty;
            picture: an image file that lies beside the card, or None; limits: a sentence or None.

    Raises:
        ValueError: a fact is missing or unknown (Jinja would leave an empty place in silence), `id2label` does not
            count up from 0, or a network's `per_category_iou` has another count of classes.
    """
    missing, unknown = set(_FACTS) - set(facts), set(facts) - set(_FACTS)
    if missing or unknown:
        raise ValueError(f"Facts of a model card: missing {sorted(missing)}, unknown {sorted(unknown)}.")
    is_best = facts["best"].get("step") == facts["step"]
    own = facts["best"] if is_best else facts["scores"]  # of the step that is exported
    networks = [name for name in own if name not in ("step", "branch")]
    _check_classes(facts["id2label"], {name: own[name] for name in networks})
    citations = [_CITATION, facts["citation"]] if facts["citation"] else [_CITATION]
    card = ModelCard.from_template(
        _metadata(facts, own.get(facts["branch"], {})),
        template_str=(files(__package__) / "model_card_template.md").read_text(encoding="utf-8"),
        **{name: _shown(value) for name, value in facts.items() if name not in ("scores", "best")},
        model_id=json.dumps(_without_paths(facts["directory"])),
        networks=networks,
        own=own,
        scores=facts["scores"],
        best=facts["best"],
        citations=[text.strip().replace("```", "'''") for text in dict.fromkeys(citations)],
        percent=_percent,
    )
    return f"{str(card).rstrip()}\n"


def _check_classes(id2label: Mapping[int, str], scores: Mapping[str, Mapping[str, Any]]) -> None:
    """Else a table would say, with dashes, that a class does not occur."""
    count = len(id2label)
    if set(id2label) != set(range(count)):
        raise ValueError(f"`id2label` of a model card must have the keys 0 to {count - 1}, {[*id2label]} found.")
    for name, score in scores.items():
        found = len(score["per_category_iou"])
        if found != count:
            raise ValueError(f"`per_category_iou` of {name} has {found} values for {count} classes.")


def escape_markdown(text: Any) -> str:
    """A text that a Markdown page or a table cell shows as it is."""
    text = re.sub(r"([\\`*_\[\]{}|~$#])", r"\\\1", " ".join(str(text).split()))
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _shown(value: Any) -> Any:
    """Facts as the template prints them: every text escaped and without paths, at any depth; numbers as they are."""
    if isinstance(value, Mapping):
        return {_shown(name): _shown(item) for name, item in value.items()}
    if value is None or isinstance(value, int | float):
        return value
    return escape_markdown(_without_paths(value))


def _without_paths(value: Any) -> str:
    """One line, in which paths of this machine are cut to names."""
    path = r"""(^|[\s'",(\[=])((?:/|~/|\.\.?[/\\]|[A-Za-z]:[/\\]|\\\\)(?=\S)[^'",)\]]+)"""
    return re.sub(path, lambda m: m[1] + re.split(r"[/\\]", m[2].rstrip("/\\"))[-1], " ".join(str(value).split()))


def _hub_id(name: str | None) -> str | None:
    """`name` if the Hub could have it."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def _metadata(facts: Mapping[str, Any], own: Mapping[str, Any]) -> ModelCardData:
    dataset = _without_paths(facts["dataset_name"]) if facts["dataset_name"] else None
    results = [
        EvalResult(
            task_type="image-segmentation",
            task_name="Semantic Segmentation",
            dataset_type=re.sub(r"[^\w./-]+", "-", dataset),
            dataset_name=dataset,
            dataset_split="validation",
            metric_type=metric,
            metric_name=name,
            metric_value=float(own[metric]),  # a numpy float would poison the YAML
        )
        for metric, name in (("mean_iou", "mIoU"), ("mean_accuracy", "mean accuracy"))
        if dataset and _is_number(own.get(metric))
    ]
    return ModelCardData(
        model_name=_without_paths(facts["model_name"]),
        license=facts["license"] or "unknown",
        library_name="transformers",
        pipeline_tag="image-segmentation",
        base_model=_hub_id(facts["base_model"]),
        datasets=[dataset] if dataset and "/" in dataset and _hub_id(dataset) else None,  # as the Hub names them
        metrics=["mean_iou"],
        tags=["semantic-segmentation", "semi-supervised-learning", "cross-pseudo-supervision", "cps_hf"],
        eval_results=results or None,
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and math.isfinite(value)


def _percent(value: Any) -> str:
    return f"{100 * value:.2f}" if _is_number(value) else "-"


def push_branch(
    directory: str | os.PathLike,
    repo_id: str,
    *,
    private: bool = True,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload a branch trained with cps_hf",
    create_pr: bool = False,
    tag: str | None = None,
) -> str:
    """Upload an exported branch in one commit, and say where it is.

    README.md in `directory` gets the repository's name (and `revision`) into its example and, where no license was
    chosen, the base model's license, before it is uploaded.

    Args:
        directory: written by `export_branch`.
        repo_id: "user/name" (or "name": the token's user).
        private: only matters for a repository that does not exist yet.
        token: none: the one of `hf auth login` or HF_TOKEN. It is never logged.
        revision: a branch of the repository, made if missing; none: main.
        tag: a name for the commit, like "v1".

    Returns:
        The commit's address (the pull request's, with `create_pr`).

    Raises:
        ValueError: `directory` is no exported branch, `repo_id` is no name, or there is no token.
        RuntimeError: the Hub did not take it; the message holds the call that pushes later.
    """
    directory = Path(directory)
    _check_push(directory, repo_id, token)
    if create_pr and tag is not None:
        raise ValueError("`tag` names a commit of a branch, and `create_pr` makes none: tag after merging.")
    options = {"private": private, "revision": revision, "commit_message": commit_message}
    options |= {"create_pr": create_pr, "tag": tag}
    given = "".join(f", {name}={value!r}" for name, value in options.items())
    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        _finish_card(directory, repo_id, revision, api)
        address, commit = _commit(api, directory, repo_id, revision, commit_message, create_pr)
        if tag is not None:
            api.create_tag(repo_id, tag=tag, revision=commit)
    except Exception as error:  # of the Hub, the network or the disk
        raise RuntimeError(
            f"Pushing {directory} to {repo_id} failed: {type(error).__name__}: {error}. Nothing is lost, the branch "
            f"is in {directory}. To push it later, in Python: "
            f"cps_hf.hub.push_branch({str(directory)!r}, {repo_id!r}{given})"
        ) from error
    logger.info("Pushed %s to %s.", directory, address)
    return address


def _check_push(directory: Path, repo_id: str, token: str | None) -> None:
    missing = [name for name in ("config.json", "preprocessor_config.json") if not (directory / name).is_file()]
    if not missing and not [*directory.glob("*.safetensors")]:
        missing = ["model.safetensors"]
    if missing:
        raise ValueError(f"{directory} is no exported branch: it has no {' and no '.join(missing)}.")
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f'`repo_id` must be like "user/name", got {repo_id!r}: {error}') from error
    if (token or get_token()) is None:
        raise ValueError("Pushing needs a token: run `hf auth login`, set HF_TOKEN, or pass `token=`.")


def _finish_card(directory: Path, repo_id: str, revision: str | None, api: HfApi) -> None:
    """The repository's name and branch in the card's example; the base model's license where none was chosen."""
    path = directory / "README.md"
    if not path.is_file():
        logger.warning("%s has no README.md: the repository will have no model card.", directory)
        return
    card = ModelCard.load(path)
    card.text = re.sub(r"^model_id = \".*\"$", f"model_id = {json.dumps(repo_id)}", card.text, flags=re.M)
    of_branch = f", revision={json.dumps(revision)}" if revision is not None else ""
    call = r'(from_pretrained\(model_id|model=model_id)(, revision="[^"]*")?'  # of an earlier push
    card.text = re.sub(call, lambda found: found[1] + of_branch, card.text)
    if card.data.license == "unknown" and card.data.base_model:
        try:
            base = api.model_info(card.data.base_model).card_data or {}
        except HfHubHTTPError as error:
            logger.warning("The license of %s is not known (%s).", card.data.base_model, type(error).__name__)
            base = {}
        for field in ("license", "license_name", "license_link"):
            if base.get(field):
                setattr(card.data, field, base.get(field))
    temporary = path.with_name("README.md.tmp")
    temporary.write_text(str(card), encoding="utf-8")
    os.replace(temporary, path)


def _commit(
    api: HfApi, directory: Path, repo_id: str, revision: str | None, message: str, create_pr: bool
) -> tuple[str, str]:
    """One commit: its address and hash. When the answer is lost it looks like a failure: the repository is asked."""
    before = api.repo_info(repo_id, revision=revision).sha
    try:
        info = api.upload_folder(
            repo_id=repo_id, folder_path=directory, commit_message=message, revision=revision, create_pr=create_pr
        )
        return info.pr_url or info.commit_url, info.oid
    except Exception:
        newest = None if create_pr else _newest_commit(api, repo_id, revision)
        if newest is None or newest.commit_id == before or newest.title != message:
            raise
        return f"{api.endpoint}/{repo_id}/commit/{newest.commit_id}", newest.commit_id


def _newest_commit(api: HfApi, repo_id: str, revision: str | None) -> GitCommitInfo | None:
    try:
        return api.list_repo_commits(repo_id, revision=revision)[0]
    except Exception:  # the Hub is gone: the first error is the one to tell
        return None
