"""One small made-up labeling project, written in the export format of each annotation tool.

Three images: `a` with overlapping shapes, one of which extends beyond the edge; `ümlaut b` with two that share an edge
(and a hole if the tool supports holes); `empty` without shapes. No outline passes through a pixel's centre.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from xml.sax.saxutils import quoteattr

import numpy as np
from matplotlib.path import Path as Outline
from PIL import Image

LABELS = ("road", "car", "Bäume")
COLORS = {"background": (0, 0, 0), "road": (128, 64, 128), "car": (0, 0, 142), "Bäume": (107, 142, 35)}


@dataclass
class Drawn:
    """An image of the project: its shapes, later ones on top, each a label and an outline (N, 2)."""

    name: str
    height: int
    width: int
    shapes: list[tuple[str, list[tuple[float, float]]]] = field(default_factory=list)

    def mask(self, names=("background", *LABELS)) -> np.ndarray:
        """Class ids from matplotlib's own test of whether each pixel's centre is inside."""
        ids = np.zeros((self.height, self.width), np.uint8)
        for label, points in self.shapes:
            ids[inside(points, self.height, self.width)] = names.index(label)
        return ids


def inside(points, height, width) -> np.ndarray:
    y, x = np.mgrid[:height, :width] + 0.5
    found = Outline([*points, points[0]], closed=True).contains_points(np.stack([x.ravel(), y.ravel()], 1))
    return found.reshape(height, width)


PROJECT = [
    Drawn(
        "a",
        48,
        64,
        [
            ("road", [(0, 30.2), (64, 20.1), (64, 48), (0, 48)]),
            ("car", [(10.3, 25.2), (30.7, 24.1), (33.2, 40.6), (21.3, 33.3), (8.4, 41.9)]),
            ("Bäume", [(50.2, -6.1), (71.3, -5.2), (70.2, 14.8), (52.1, 15.3)]),
        ],
    ),
    Drawn(
        "ümlaut b",
        40,
        50,
        [
            ("road", [(3.1, 4.2), (25.3, 2.4), (22.2, 38.7), (5.4, 33.1)]),
            ("car", [(25.3, 2.4), (47.2, 11.3), (40.4, 36.2), (22.2, 38.7)]),
        ],
    ),
    Drawn("empty", 30, 20),
]


def write_images(folder: Path, suffix: str = ".png") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for drawn in PROJECT:
        pixels = np.full((drawn.height, drawn.width, 3), 200, np.uint8)
        for index, (_, points) in enumerate(drawn.shapes):
            pixels[inside(points, drawn.height, drawn.width)] = (70 * index, 140, 220 - 70 * index)
        Image.fromarray(pixels).save(folder / f"{drawn.name}{suffix}")


def write_json(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def png(mask: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(mask).save(file, format="PNG")
    return file.getvalue()


# ------------------------------------------------------------------------------------------------ runs


def runs_of(flat) -> list[int]:
    """Lengths of outside, inside, outside ..., counted one by one."""
    runs, value = [0], 0
    for pixel in np.asarray(flat).astype(int):
        if pixel != value:
            runs.append(0)
            value = pixel
        runs[-1] += 1
    return runs


def compressed(runs: list[int]) -> str:
    """COCO's text, by its definition."""
    text = ""
    for i, run in enumerate(runs):
        value, more = run - (runs[i - 2] if i > 2 else 0), True
        while more:
            bits, value = value & 31, value >> 5
            more = value != (-1 if bits & 16 else 0)
            text += chr((bits | 32 * more) + 48)
    return text


def brush(mask: np.ndarray) -> list[int]:
    """Label Studio's bytes: runs where a value repeats, else blocks of values."""
    flat = np.repeat((mask * 255).ravel(), 4)
    bits = f"{len(flat):032b}" + f"{7:05b}" + "".join(f"{size - 1:04b}" for size in (3, 4, 8, 16))
    start = 0
    while start < len(flat):
        end = start + 1
        while end < len(flat) and flat[end] == flat[start] and end - start < 65536:
            end += 1
        if end - start > 2:
            which, size = next((i, s) for i, s in enumerate((3, 4, 8, 16)) if end - start <= 1 << s)
            bits += f"1{which:02b}{end - start - 1:0{size}b}{flat[start]:08b}"
        else:
            bits += f"000{end - start - 1:03b}" + "".join(f"{value:08b}" for value in flat[start:end])
        start = end
    bits += "0" * (-len(bits) % 8)
    return [int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)]


# ------------------------------------------------------------------------------------------------ tools


def coco(folder: Path, segmentation: str = "polygon") -> None:
    """The layout of CVAT and others: annotations/instances_default.json and images/."""
    write_images(folder / "images")
    categories = [{"id": 3 * i + 1, "name": name, "supercategory": ""} for i, name in enumerate(LABELS)]
    ids = {row["name"]: row["id"] for row in categories}
    images, annotations = [], []
    for index, drawn in enumerate(PROJECT, 1):
        images.append({"id": index, "file_name": f"{drawn.name}.png", "height": drawn.height, "width": drawn.width})
        for label, points in drawn.shapes:
            mask = inside(points, drawn.height, drawn.width)
            runs = runs_of(mask.T.ravel())
            size = [drawn.height, drawn.width]
            outline = {
                "polygon": [np.ravel(points).tolist()],
                "runs": {"size": size, "counts": runs},
                "compressed": {"size": size, "counts": compressed(runs)},
            }[segmentation]
            row = {"id": len(annotations) + 1, "image_id": index, "category_id": ids[label]}
            annotations.append(row | {"segmentation": outline, "area": int(mask.sum()), "iscrowd": 0})
    content = {"images": images, "annotations": annotations, "categories": categories}
    write_json(folder / "annotations" / "instances_default.json", content)


def labelme(folder: Path) -> None:
    """Each JSON file next to its image; labels.txt in the format of the program's `--labels`."""
    write_images(folder)
    (folder / "labels.txt").write_text("\n".join(["__ignore__", "_background_", *LABELS]), encoding="utf-8")
    for drawn in PROJECT:
        shapes = [
            {"label": label, "points": points, "group_id": None, "shape_type": "polygon", "flags": {}}
            for label, points in drawn.shapes
        ]
        content = {"version": "5.4.1", "flags": {}, "shapes": shapes, "imagePath": f"{drawn.name}.png"}
        size = {"imageData": None, "imageHeight": drawn.height, "imageWidth": drawn.width}
        write_json(folder / f"{drawn.name}.json", content | size)


def cvat(folder: Path) -> None:
    """ "CVAT for images 1.1": the shapes in the wrong order, which z_order corrects."""
    write_images(folder / "images")
    labels = "".join(f"<label><name>{name}</name><color>#804080</color></label>" for name in LABELS)
    text = f'<?xml version="1.0" encoding="utf-8"?>\n<annotations><version>1.1</version><meta><task><labels>{labels}'
    text += "</labels></task></meta>"
    for index, drawn in enumerate(PROJECT):
        text += f'<image id="{index}" name={quoteattr(drawn.name + ".png")} width="{drawn.width}" '
        text += f'height="{drawn.height}">'
        for z, (label, points) in reversed([*enumerate(drawn.shapes)]):
            pairs = ";".join(f"{x},{y}" for x, y in points)
            text += f'<polygon label={quoteattr(label)} source="manual" occluded="0" points="{pairs}" z_order="{z}"/>'
        text += "</image>"
    (folder / "annotations.xml").write_text(f"{text}</annotations>", encoding="utf-8")


def cvat_masks(folder: Path) -> None:
    """ "Segmentation mask 1.1", saved with its images."""
    write_images(folder / "JPEGImages")
    lines = ["# label:color_rgb:parts:actions", *(f"{k}:{','.join(map(str, v))}::" for k, v in COLORS.items())]
    (folder / "labelmap.txt").write_text("\n".join(lines), encoding="utf-8")
    (folder / "ImageSets" / "Segmentation").mkdir(parents=True)
    names = "\n".join(drawn.name for drawn in PROJECT)
    (folder / "ImageSets" / "Segmentation" / "default.txt").write_text(names, encoding="utf-8")
    for kind in ("SegmentationClass", "SegmentationObject"):
        _write_colors(folder / kind)


def _write_colors(folder: Path) -> None:
    folder.mkdir()
    for drawn in PROJECT:
        colors = np.array([*COLORS.values()], np.uint8)[drawn.mask()]
        Image.fromarray(colors).save(folder / f"{drawn.name}.png")


def colors(folder: Path) -> None:
    """RGB masks and a table."""
    write_images(folder / "images")
    _write_colors(folder / "masks")
    write_json(folder / "table.json", {f"#{bytes(color).hex()}": name for name, color in COLORS.items()})


def ids(folder: Path, first: int = 1) -> None:
    """Grey masks whose first class is 1."""
    write_images(folder / "images")
    (folder / "masks").mkdir()
    for drawn in PROJECT:
        values = drawn.mask() + np.uint8(first - 1)
        Image.fromarray(values).save(folder / "masks" / f"{drawn.name}.png")


def objects(folder: Path, layout: str = "{image}/{label}_{number}.png") -> None:
    """One file per object, of 0 and 255. The image without objects has no file: it is not labeled."""
    write_images(folder / "images")
    for drawn in PROJECT:
        for number, (label, points) in enumerate(drawn.shapes):
            path = folder / "masks" / layout.format(image=drawn.name, label=label, number=number)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((inside(points, drawn.height, drawn.width) * 255).astype(np.uint8)).save(path)


def label_studio(folder: Path, kind: str = "polygonlabels") -> None:
    """ "JSON": the file has the images' upload names, and the disk their own names."""
    write_images(folder / "images")
    tasks = []
    for index, drawn in enumerate(PROJECT, 1):
        results = []
        for number, (label, points) in enumerate(drawn.shapes):
            if kind == "brushlabels":
                value = {"format": "rle", "rle": brush(inside(points, drawn.height, drawn.width).astype(np.uint8))}
            else:
                shares = (np.array(points) * 100 / (drawn.width, drawn.height)).tolist()
                value = {"points": shares, "closed": True}
            row = {"id": f"r{number}", "type": kind, "from_name": "label", "to_name": "image", "image_rotation": 0}
            size = {"original_width": drawn.width, "original_height": drawn.height}
            results.append(row | size | {"value": value | {kind: [label]}})
        upload = f"3f2a81c{index}-{drawn.name}.png"
        done = {"id": index, "was_cancelled": False, "updated_at": "2026-01-02T00:00:00Z", "result": results}
        tasks.append({"id": index, "data": {"image": f"/data/upload/1/{upload}"}, "annotations": [done]})
    write_json(folder / "project-1.json", tasks)


def roboflow_masks(folder: Path) -> None:
    """ "Semantic Segmentation Masks": two splits."""
    for split, some in (("train", PROJECT[:2]), ("valid", PROJECT[2:])):
        write_images(folder / "all")
        (folder / split).mkdir()
        for drawn in some:
            (folder / "all" / f"{drawn.name}.png").rename(folder / split / f"{drawn.name}.png")
            Image.fromarray(drawn.mask()).save(folder / split / f"{drawn.name}_mask.png")
        with open(folder / split / "_classes.csv", "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([["Pixel Value", " Class"], *([i, f" {n}"] for i, n in enumerate(COLORS))])
    for path in (folder / "all").iterdir():
        path.unlink()
    (folder / "all").rmdir()


def roboflow_coco(folder: Path) -> None:
    """Its COCO: the JSON file among the images of a split, and a category above the others."""
    coco(folder / "x")
    (folder / "x" / "images").rename(folder / "train")
    content = json.loads((folder / "x" / "annotations" / "instances_default.json").read_text(encoding="utf-8"))
    for row in content["categories"]:
        row["supercategory"] = "streets"
    content["categories"].insert(0, {"id": 0, "name": "streets", "supercategory": "none"})
    write_json(folder / "train" / "_annotations.coco.json", content)
    (folder / "x" / "annotations" / "instances_default.json").unlink()


def yolo(folder: Path) -> None:
    """images/train, labels/train and data.yaml."""
    write_images(folder / "images" / "train")
    (folder / "labels" / "train").mkdir(parents=True)
    names = "\n".join(f"  {i}: {name}" for i, name in enumerate(LABELS))
    (folder / "data.yaml").write_text(f"path: .\ntrain: images/train\nnames:\n{names}\n", encoding="utf-8")
    for drawn in PROJECT:
        lines = []
        for label, points in drawn.shapes:
            shares = np.ravel(np.array(points) / (drawn.width, drawn.height)).tolist()
            lines.append(" ".join(map(str, [LABELS.index(label), *shares])))
        (folder / "labels" / "train" / f"{drawn.name}.txt").write_text("\n".join(lines))


def supervisely(folder: Path) -> None:
    """The cars as bitmaps, everything else as polygons."""
    write_images(folder / "ds0" / "img")
    classes = [{"title": name, "shape": "any", "color": "#804080"} for name in LABELS]
    write_json(folder / "meta.json", {"classes": classes, "tags": []})
    for drawn in PROJECT:
        rows = []
        for label, points in drawn.shapes:
            row = {"classTitle": label, "description": "", "tags": []}
            if label == "car":
                mask = inside(points, drawn.height, drawn.width)
                top, left = np.argwhere(mask).min(0).tolist()
                data = base64.b64encode(zlib.compress(png(mask[top:, left:]))).decode()
                row |= {"geometryType": "bitmap", "bitmap": {"data": data, "origin": [left, top]}}
            else:
                row |= {"geometryType": "polygon", "points": {"exterior": points, "interior": []}}
            rows.append(row)
        size = {"height": drawn.height, "width": drawn.width}
        content = {"description": "", "tags": [], "size": size, "objects": rows}
        write_json(folder / "ds0" / "ann" / f"{drawn.name}.png.json", content)


def via(folder: Path) -> None:
    """A project of VIA 2."""
    write_images(folder)
    rows = {}
    for drawn in PROJECT:
        regions = []
        for label, points in drawn.shapes:
            xs, ys = ([point[axis] for point in points] for axis in (0, 1))
            shape = {"name": "polygon", "all_points_x": xs, "all_points_y": ys}
            regions.append({"shape_attributes": shape, "region_attributes": {"what": label}})
        name = f"{drawn.name}.png"
        rows[f"{name}123"] = {"filename": name, "size": 123, "regions": regions, "file_attributes": {}}
    options = {"what": {"type": "dropdown", "options": dict.fromkeys(LABELS, "")}}
    write_json(folder / "via.json", {"_via_img_metadata": rows, "_via_attributes": {"region": options, "file": {}}})


@dataclass(frozen=True)
class Export:
    """How to write a tool's export, and the options of `cps-hf convert` for it."""

    write: Callable[[Path], None]
    words: tuple[str, ...] = ()
    below: str = ""  # the folder of its images in OUT/masks
    has_empty: bool = True
    format: str = ""


NAMES = ("--classes", *LABELS)
EXPORTS = {
    "coco": Export(coco),
    "coco, runs": Export(lambda folder: coco(folder, "runs"), format="coco"),
    "coco, compressed runs": Export(lambda folder: coco(folder, "compressed"), format="coco"),
    "labelme": Export(labelme),
    "cvat": Export(cvat),
    "cvat_masks": Export(cvat_masks),
    "colors": Export(colors, ("--format", "colors", "--colors", "SOURCE/table.json")),
    "ids": Export(ids, ("--format", "ids", "--first_id", "1", *NAMES)),
    "objects": Export(objects, ("--format", "objects", "--classes", "background", *LABELS), has_empty=False),
    "label_studio": Export(label_studio),
    "label_studio, brush": Export(lambda folder: label_studio(folder, "brushlabels"), format="label_studio"),
    "roboflow_masks": Export(roboflow_masks),
    "roboflow, COCO": Export(roboflow_coco, below="train/", format="coco"),
    "yolo": Export(yolo, below="train/"),
    "supervisely": Export(supervisely, below="ds0/"),
    "via": Export(via),
}
