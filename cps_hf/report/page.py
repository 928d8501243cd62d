"""`OUT/report.html`: one file that opens anywhere, without scripts and without a network.

Everything is read from the run's output folder; missing parts are omitted. Names of classes, images and settings come
from the user and may contain anything: the template escapes all of them.
"""

from __future__ import annotations

import base64
import functools
import io
import math
import os
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
import yaml

from ..files import write_atomically
from ..hub.loading import loading_lines
from ..visualization.colors import overlay_name
from ..visualization.runs import EVALUATION, class_rows, confusion_figure, image_caption, read_json, read_records

REPORT = "report.html"
RANKING, RANKING_SHEET = "ranking.json", Path("pictures", "ranking.png")
"""What `cps-hf rank` adds to a run: {"key", "images", "first"}, and its contact sheet."""
CELLS = 40  # classes; with more, the confusion matrix is a picture instead of a table
# What a reader wants to know first; the other settings are collapsed.
_FIRST = (
    *("objective", "models", "backbone", "max_steps", "pretrain_steps", "per_device_train_batch_size", "crop_size"),
    *("optim", "learning_rate", "class_weights", "freeze_norms", "labeled_color_jitter", "image_mean", "image_std"),
    *("eval_mode", "seed"),
)


def write_report(run: str | os.PathLike) -> Path:
    """Write the page of a finished run into its output folder.

    Args:
        run: the output folder. Its results.json is required; everything else that the run wrote is shown if present.

    Returns:
        The file's path.

    Raises:
        ValueError: the folder has no results.json of a run, or one of its files is incomplete.
        OSError: a file cannot be read or written.
    """
    run = Path(run)
    path = run / REPORT
    write_atomically(path, render_report(run))
    return path


def render_report(run: str | os.PathLike) -> str:
    """The page as text. Raises the errors of `write_report`."""
    run = Path(run)
    results = read_json(run / "results.json")
    if not isinstance(results, Mapping) or "training" not in results:
        raise ValueError(_without_results(run))
    evaluation = read_json(run / EVALUATION)
    settings = _settings(run)
    has_best = (run / "best").is_dir()
    described, exported = _networks(results.get("best") if has_best else None, evaluation, settings)
    branch = run / ("best" if has_best else "branch_0")
    return _template().render(
        name=run.resolve().name,
        results=results,
        facts=_facts(results, described, exported),
        described=described,
        exported=exported,
        plan=_plan(run, settings),
        settings=settings,
        comparison=_comparison(results.get("comparison")),
        compared=_compared(_comparison_file(run)),
        curves=_data_uri(run / "pictures" / "curves.png"),
        collapse=_collapse(read_records(run)),
        evaluation=evaluation,
        classes=_classes(evaluation),
        images=_images(run, evaluation),
        matrix=_matrix(evaluation),
        matrix_picture=_matrix_picture(run, evaluation),
        ranking=read_json(run / RANKING),
        ranking_sheet=_data_uri(run / RANKING_SHEET),
        loading=loading_lines(branch) if branch.is_dir() else [],
    )


@functools.cache
def _template() -> jinja2.Template:
    text = (files("cps_hf") / "report" / "page.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": _percent, "points": _points, "shown": _shown, "words": _words}
    return environment.from_string(text)


# ------------------------------------------------------------------------------------------------ content


def _without_results(run: Path) -> str:
    """The error for a folder without results.json."""
    if not run.is_dir():
        return f"{run} is {'a file' if run.exists() else 'missing'}. Give the output folder of `cps-hf train`."
    records = read_records(run)
    if not records and not (run / "config.yaml").is_file():
        return f"{run} has no results.json of a finished run. Give the output folder of `cps-hf train`."
    step = f" It logged step {records[-1]['step']} last." if records else ""
    return (
        f"{run} has no results.json: the run is not finished.{step} If it is no longer running, continue it by adding "
        "`--resume_from_checkpoint auto` to its command; it writes its report at the end."
    )


class _Network(NamedTuple):
    """A network of the run: "branch 0 at step 40" and its mean IoU on the evaluation images."""

    name: str
    mean_iou: float


def _networks(
    best: Mapping[str, Any] | None, evaluation: Mapping[str, Any] | None, settings: Mapping[str, Any]
) -> tuple[_Network | None, _Network | None]:
    """The network that the page's tables and images are of, and the one in `best/`. They are equal unless the run
    could not keep the evaluation of `best/`, or an older version wrote it."""
    first_stage = settings.get("pretrain_steps") or 0

    def name(row: str, step: int) -> str:
        return f"{_words(row)} at step {step}{', supervised stage' if step <= first_stage else ''}"

    described = exported = None
    if best:
        exported = _Network(name(best["branch"], best["step"]), best[best["branch"]]["mean_iou"])
    if evaluation:
        known = [row["iou"] for row in class_rows(evaluation) if row["iou"] is not None]
        score = sum(known) / len(known) if known else math.nan
        described = _Network(name(evaluation["network"], evaluation["step"]), score)
    return described or exported, exported


def _facts(results: Mapping[str, Any], described: _Network | None, exported: _Network | None) -> list[tuple[str, str]]:
    """The lines at the top: which network the page describes, what was trained on what, and for how long."""
    training, method = results["training"], (results.get("objective") or {}).get("name") or ""
    seconds = training.get("seconds")
    images = [
        f"{results[key]} {kind}"
        for key, kind in (("num_labeled", "labeled"), ("num_unlabeled", "unlabeled"))
        if results.get(key)
    ]
    found = [
        ("Method", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", method)),
        ("Images", ", ".join(images)),
        ("Steps", f"{results.get('steps', '')}"),
        (
            "Training time",
            "" if seconds is None else f"{_duration(seconds)} on {training.get('device', '?')}",
        ),
    ]
    if described and exported and described.name == exported.name:
        found[:0] = [("Best network", described.name), ("Its mean IoU", f"{_percent(described.mean_iou)} %")]
    else:
        networks = (("Network on this page", described), ("Best network (best/)", exported))
        found[:0] = [(title, f"{one.name}, mean IoU {_percent(one.mean_iou)} %") for title, one in networks if one]
    return [(title, text) for title, text in found if text]


def _settings(run: Path) -> dict[str, Any]:
    """config.yaml; empty if there is none that can be read."""
    path = run / "config.yaml"
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    except yaml.YAMLError:
        found = None
    return dict(found) if isinstance(found, Mapping) else {}


def _plan(run: Path, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Lines of {"name", "value", "reason"} from plan.json; without it, the settings a reader looks for first."""
    plan = read_json(run / "plan.json")
    if isinstance(plan, Sequence) and not isinstance(plan, str):
        rows = [row for row in plan if isinstance(row, Mapping) and "name" in row]
        return [{"name": r["name"], "value": r.get("value"), "reason": r.get("reason") or ""} for r in rows]
    given = [name for name in _FIRST if settings.get(name) not in (None, [])]
    return [{"name": name, "value": settings[name], "reason": ""} for name in given]


def _comparison(found: Any) -> dict[str, Any] | None:
    """The parts of results.json's "comparison" that the page needs; None if there is none."""
    if not isinstance(found, Mapping) or not found.get("sentence"):
        return None
    rows = [row for row in (found.get("branches") or {}).values() if isinstance(row, Mapping)]
    return {"sentence": found["sentence"], "classes": rows[0].get("classes", []) if rows else []}


def _compared(found: Any) -> dict[str, Any] | None:
    """comparison.json of `cps-hf compare`; None if there is none."""
    if not isinstance(found, Mapping):
        return None
    titles = {
        "supervised": "without unlabeled images",
        "supervised_equal_time": "without them, trained as long",
        "semi_supervised": "with unlabeled images",
    }
    rows = [{"title": title, **found[key]} for key, title in titles.items() if isinstance(found.get(key), Mapping)]
    return {"rows": rows, "difference": found.get("difference") or {}, "images": found.get("images")} if rows else None


def _comparison_file(run: Path) -> Any:
    """What `cps-hf compare` wrote into the folder that contains its runs."""
    folder = run.resolve()
    return read_json((folder.parent if folder.name == "semi_supervised" else folder) / "comparison.json")


def _collapse(records: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    """The last measured agreement, with the share of the most common class among the predictions."""
    measured = [record for record in records if record.get("eval_agreement") is not None]
    if not measured:
        return None
    commonest = measured[-1].get("eval_commonest_class")
    return {"agreement": measured[-1]["eval_agreement"], "commonest": commonest}


def _classes(evaluation: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    rows = class_rows(evaluation) if evaluation else []
    return [
        {
            **row,
            "color": "#{:02x}{:02x}{:02x}".format(*map(int, row["color"])),
            "in_overlay": overlay_name(row["name"], row["color"]),
        }
        for row in rows
    ]


def _images(run: Path, evaluation: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The groups "worst" and "best" with their images; a group without a picture is omitted."""
    groups = []
    for kind, title in (("worst", "Lowest mean IoU"), ("best", "Highest mean IoU")):
        rows = [
            {
                "caption": image_caption(row),
                "id": row["id"],
                "pictures": [_data_uri(run / name) for name in row["files"]],
            }
            for row in (evaluation or {}).get(kind, [])
        ]
        rows = [row for row in rows if all(row["pictures"])]
        if rows:
            groups.append({"title": title, "rows": rows})
    return groups


def _matrix(evaluation: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The rows of the confusion matrix in percent of the true class; empty if a picture shows them."""
    if not evaluation or len(evaluation["classes"]) > CELLS:
        return []
    matrix = np.asarray(evaluation["confusion_matrix"], np.float64)
    rows = []
    for name, counts in zip(evaluation["classes"], matrix, strict=True):
        total = counts.sum()
        rows.append({"name": name, "shares": [100 * count / total if total else None for count in counts.tolist()]})
    return rows


def _matrix_picture(run: Path, evaluation: Mapping[str, Any] | None) -> str | None:
    """The confusion matrix of many classes, drawn."""
    if not evaluation or len(evaluation["classes"]) <= CELLS:
        return None
    file = io.BytesIO()
    confusion_figure(run).savefig(file, format="png")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


# ------------------------------------------------------------------------------------------------ formatting


def _data_uri(path: Path) -> str | None:
    """A picture as a data URI; None if there is no picture."""
    if not path.is_file():
        return None
    kind = "jpeg" if path.suffix == ".jpg" else "png"
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None or math.isnan(value) else f"{100 * value:.{digits}f}"


def _points(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{100 * value:+.1f}"


def _words(name: Any) -> str:
    return str(name).replace("_", " ")


def _shown(value: Any) -> str:
    """A setting as a reader would write it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_shown, value))
    return "none" if value is None else str(value)


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{round(seconds)} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
