"""A page for trying branches. Input: an image. Output: overlay, class shares, another branch's view, differences.

Plain Python: `Page.segment` does the work, and interface.py wraps it in Gradio. Nothing is loaded from other servers:
no fonts, no telemetry.
"""

from __future__ import annotations

import html
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .. import visualization
from ..data import voc
from ..data.palettes import palette_of
from ..data.reading import read_image
from ..functional.losses import IGNORE_INDEX
from ..inference.ensemble import Ensemble
from ..inference.windows import class_ids
from ..scenes.write import draw_object_scene, draw_street_scene

MAX_PIXELS = 50_000_000  # of an uploaded image; checked in its header before its pixels are decoded
MAX_BYTES = 40 * 2**20  # of an uploaded file
PREDICTED_PIXELS = 2_097_152  # 1024 x 2048; larger images are reduced to this
SHOWN_SIDE = 512  # pixels; smaller pictures are enlarged
BRANCH_FOLDERS = ("best", "branch_0", "branch_1", "branch_0_average", "branch_1_average", "teacher")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
NO_BRANCH = "no other"
DIFFERS = visualization.AGREEMENT["disagree"]


@dataclass(frozen=True)
class Segmented:
    """What the page shows for one image: HTML and pictures, uint8 (h, w, 3), the small ones enlarged."""

    message: str
    overlay: np.ndarray | None = None
    other: np.ndarray | None = None
    differing: np.ndarray | None = None
    table: str = ""


class Page:
    """Named branches and their predictions.

    Args:
        sources: {name on the page: folder or Hub id}, see `find_branches`.
        device: if None, a GPU if available.
        max_pixels: larger images are rejected.
        predicted_pixels: larger images are reduced to this many pixels before prediction.

    Raises:
        ValueError: a branch cannot be read, or the branches have different classes.
    """

    def __init__(
        self,
        sources: Mapping[str, str],
        *,
        device: str | None = None,
        trust_remote_code: bool = False,
        max_pixels: int = MAX_PIXELS,
        predicted_pixels: int = PREDICTED_PIXELS,
    ):
        self.names = list(sources)
        self.branches = Ensemble.from_pretrained(
            list(sources.values()), device=device, trust_remote_code=trust_remote_code
        )
        self.classes = [self.branches.id2label[i] for i in range(len(self.branches.id2label))]
        self.palette = palette_of(None, self.classes)
        self.max_pixels, self.predicted_pixels = max_pixels, predicted_pixels

    def segment(self, path: str | None, name: str, other: str | None) -> Segmented:
        """Predict the image file with branch `name`, and with `other` unless it is None or `NO_BRANCH`."""
        if path is None:
            return Segmented(_message("Drop an image, or pick an example."))
        try:
            image, said = self._read(path)
            prediction = self._predict(image, name)
            beside = self._predict(image, other) if other in self.names and other != name else None
        except ValueError as error:
            return Segmented(_message(str(error), error=True))
        overlay = _shown(visualization.overlay(image, prediction, self.palette))
        if beside is None:
            return Segmented(_message(said), overlay, table=self._table({name: prediction}))
        differs = prediction != beside
        share = 100 * float(differs.float().mean())
        said += f" {name} and {other} differ on {share:.1f} % of the pixels."
        where = torch.where(differs, 0, IGNORE_INDEX)
        pale = (image.numpy() // 2 + 127).astype(np.uint8).transpose(1, 2, 0)
        return Segmented(
            _message(said),
            overlay,
            _shown(visualization.overlay(image, beside, self.palette)),
            _shown(visualization.overlay(pale, where, [DIFFERS], 0.8)),
            self._table({name: prediction, other: beside}),
        )

    def _read(self, path: str) -> tuple[Tensor, str]:
        """The image, uint8 (3, H, W), small enough to predict, and a text that describes its size."""
        name = Path(path).name
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                with Image.open(path) as file:  # reads the header only
                    width, height = file.size
        except Image.DecompressionBombError:
            width = height = math.inf
        except Exception as error:  # PIL raises many kinds on broken files
            raise ValueError(f"{name} cannot be read: it is damaged or not an image. Try another file.") from error
        most = f"{self.max_pixels / 1e6:g} megapixels"
        if width * height > self.max_pixels:
            size = f"{width} × {height} pixels" if math.isfinite(width) else "far more pixels than that"
            raise ValueError(f"{name} is too large: {size}, and this page takes up to {most}. Reduce it.")
        try:
            image = read_image({"bytes": None, "path": path}, name=name)
        except ValueError as error:
            raise ValueError(f"{name} cannot be read: it is damaged or not an image. Try another file.") from error
        height, width = image.shape[-2:]
        said = f"{width} × {height} pixels."
        factor = math.sqrt(self.predicted_pixels / (width * height))
        if factor < 1:
            size = [max(1, int(side * factor)) for side in (height, width)]
            smaller = F.interpolate(image[None].float(), size=size, mode="bilinear", antialias=True)
            image = smaller.round().clamp(0, 255).to(torch.uint8)[0]
            said = f"{width} × {height} pixels, reduced to {size[1]} × {size[0]}."
        return image, said

    def _predict(self, image: Tensor, name: str) -> Tensor:
        """Class ids (H, W) on the CPU."""
        index = self.names.index(name)
        try:
            logits = self.branches.logits(image, only=index)
        except ValueError:  # networks with several resolutions only take multiples of 32: pad the image
            window = tuple(-(-side // 32) * 32 for side in image.shape[-2:])
            logits = self.branches.logits(image, only=index, mode="sliding", crop_size=window, stride=window)
        return class_ids(logits)[0].cpu()

    def _table(self, predictions: Mapping[str, Tensor]) -> str:
        """The legend, and each class's share of the pixels for each branch, largest first."""
        count = len(self.classes)
        shares = [torch.bincount(ids.flatten(), minlength=count) / ids.numel() for ids in predictions.values()]
        present = [i for i in range(count) if any(share[i] > 0 for share in shares)]
        present.sort(key=lambda i: -float(shares[0][i]))
        head = "".join(f"<th>{html.escape(name)}</th>" for name in predictions)
        rows = []
        for i in present:
            color = "rgb({}, {}, {})".format(*self.palette[i])
            cells = "".join(_share_cell(float(share[i]), color) for share in shares)
            name = visualization.overlay_name(self.classes[i], self.palette[i])
            swatch = f'<b class="swatch" style="background:{color}"></b>'
            rows.append(f"<tr><td>{swatch}{html.escape(name)}</td>{cells}</tr>")
        body = "".join(rows)
        return f"<table><thead><tr><th>class</th>{head}</tr></thead><tbody>{body}</tbody></table>"


def find_branches(sources: Sequence[str]) -> dict[str, str]:
    """{name: folder or Hub id} of the sources. A run's output folder stands for its branches, the best first.

    Raises:
        ValueError: a folder is neither a branch nor a run.
    """
    found: dict[str, str] = {}
    for source in sources:
        folder = Path(source)
        if not folder.is_dir() or (folder / "config.json").is_file():
            name = source if not folder.is_dir() else folder.resolve().name
            found[source if name in found else name] = source
            continue
        inside = [name for name in BRANCH_FOLDERS if (folder / name / "config.json").is_file()]
        if not inside:
            raise ValueError(
                f"`{source}` is neither a branch (no config.json) nor a run's output folder (no {BRANCH_FOLDERS[0]}/, "
                f"{BRANCH_FOLDERS[1]}/ ...). Give one of these, or the Hub id of a model."
            )
        label = "" if len(sources) == 1 else f"{folder.resolve().name}/"
        found |= {label + name: str(folder / name) for name in inside}
    return found


def other_branch(sources: Mapping[str, str]) -> str:
    """What the first branch is compared with at the start: not the branch of which it is the best step."""
    names = list(sources)
    results = Path(sources[names[0]]).parent / "results.json"
    itself = None
    if Path(sources[names[0]]).name == "best" and results.is_file():
        itself = json.loads(results.read_text(encoding="utf-8")).get("best", {}).get("branch")
    return next((name for name in names[1:] if Path(sources[name]).name != itself), NO_BRANCH)


def write_examples(folder: Path, classes: Sequence[str], count: int = 4) -> list[str]:
    """Drawn scenes that no run was trained on, as JPEG files: objects for VOC's classes, otherwise streets."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for index in range(count):
        if tuple(classes) == tuple(voc.NAMES):
            picture, _ = draw_object_scene(3_000_000 + index)
        else:
            picture, _ = draw_street_scene(3_000_000 + index)
        path = folder / f"drawn_{index}.jpg"
        Image.fromarray(picture).save(path, quality=92)
        paths.append(str(path))
    return paths


def find_examples(folder: str) -> list[str]:
    """The images in a folder, sorted by name.

    Raises:
        ValueError: there are none.
    """
    paths = sorted(str(path) for path in Path(folder).glob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise ValueError(f"`--examples {folder}`: there is no image ({', '.join(SUFFIXES)}) in it.")
    return paths


def _message(text: str, *, error: bool = False) -> str:
    kind = 'class="message error" role="alert"' if error else 'class="message"'
    return f"<p {kind}>{html.escape(text)}</p>"


def _share_cell(share: float, color: str) -> str:
    bar = f'<i style="width:{100 * share:.1f}%;background:{color}"></i>'
    return f'<td><div class="share">{bar}</div><span>{_percent(share)}</span></td>'


def _shown(picture: np.ndarray) -> np.ndarray:
    """A small picture, enlarged by an integer factor, as the browser would blur its pixels."""
    return visualization.enlarged(picture, SHOWN_SIDE)


def _percent(share: float) -> str:
    return "–" if share == 0 else "&lt; 0.1 %" if share < 0.001 else f"{100 * share:.1f} %"
