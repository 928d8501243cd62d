"""Which images are labeled: published partitions, seeded ratios and counts, and list files.

A published partition is a formula over the ids, or a list from its authors' repository. Such a list is downloaded once
into the Hugging Face cache and rejected if its SHA-256 differs from the one below: a published number belongs to one
list.
"""

from __future__ import annotations

import difflib
import hashlib
import http.client
import logging
import os
import re
import urllib.request
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants

from ..files import written_whole
from .table import first_few

logger = logging.getLogger(__name__)

URL_VARIABLE = "CPS_HF_LISTS_URL"
"""An environment variable: where to download from instead of `https://raw.githubusercontent.com`, with equal paths."""

TRAIN_AUG_SIZE = 10_582
TRAIN_AUG_SHA256 = "d1326bd532648d73bc4b1bd275434eba81930982dc7401a65a8cecb26c028e24"
"""Of VOC's train_aug: the sorted ids, each followed by a line feed."""

_SOURCES = {
    "T": "charlesCXK/TorchSemiSeg/5e0c29c02738728b6848a732817db15620a6e034/DATA",
    "U": "LiheYoung/UniMatch/0324f3dd4a22128105a5eb135d2586c0bb3cc647/splits",
}
# Repository and path of every list that is read -> its SHA-256.
_SHA256 = {
    "T/city/config_new/train.txt": "b45be91d3bf8ebcc84214dc2b6c3867cd604a3d2ae493f1b42e7a3a211e1ebc3",
    "T/city/config_new/coarse_split/train_extra_3000.txt": (
        "a245564b1ca5681a864d64a80bfdfd946b7d45005cb286e5a23fb115b0f3bce0"
    ),
    "T/city/config_new/coarse_split/train_extra_6000.txt": (
        "c65aa7b173dee9784d0bae1c7d85899f0f4fe9c314a53346de4cb89258329048"
    ),
    "T/city/config_new/coarse_split/train_extra_9000.txt": (
        "291a6f20ce4fd48d84977c244917784977f46818641b01f30b0104b45b8a046b"
    ),
    "T/pascal_voc/subset_train_aug/pseudoseg_labeled_1-16.txt": (
        "f9bb25964b8e110f8627a72ae8dac46e2434542d980c09d5ede2e71bc644d549"
    ),
    "T/pascal_voc/subset_train_aug/pseudoseg_labeled_1-8.txt": (
        "059a72de4349da85987c6d67746b9cb4adf3aed4d4cd22e72c78fa2f2f75c3c5"
    ),
    "T/pascal_voc/subset_train_aug/pseudoseg_labeled_1-4.txt": (
        "49a153ad29a53e4af0d028b3c8daf7a41a68b91adb5a4cffed3112d7b2c64fd2"
    ),
    "T/pascal_voc/subset_train_aug/pseudoseg_labeled_1-2.txt": (
        "6a7f49d09dce47787d2a4ada72119fea9a1c75f10048fdcb8e03b99cbd7d6da7"
    ),
    "T/pascal_voc/subset_train_aug/pseudoseg_unlabeled_1-16.txt": (
        "676a6bd82f285e2e65db5444c1983f999c8827918c25a92854bd9aa9e0a0c2e0"
    ),
    "T/pascal_voc/subset_train_aug/pseudoseg_unlabeled_1-8.txt": (
        "1a2db3987cbf59c9b0f5df5371497e63d154caccdd664d04f16a081b611d934a"
    ),
    "T/pascal_voc/subset_train_aug/pseudoseg_unlabeled_1-4.txt": (
        "6d81e371b9623175180fa93001fff4403432153436b38d5b59a0eb586d1826ae"
    ),
    "T/pascal_voc/subset_train_aug/pseudoseg_unlabeled_1-2.txt": (
        "a891dcb1f2e3d8168c15653fa639281a2e4826717ff7981c64c56af6abe07b29"
    ),
    "U/pascal/92/labeled.txt": "8a02aa6a1253178b105bd25b36f0a27daeedf6b3959f399aa47d24783f3a8306",
    "U/pascal/92/unlabeled.txt": "a3eb5ef8d2ae547f131bfa60b8111d21700d458b545741336633d5aa209254d5",
    "U/pascal/183/labeled.txt": "de3f4680391cb15324402dae17ac0919933d0d9004c11a641c924f3f67147f9f",
    "U/pascal/183/unlabeled.txt": "39aa3fd2997799c57c7d68d1ab342e2ebf53224ab10c1766a9fcd1554afbfd6a",
    "U/pascal/366/labeled.txt": "74f6bd1e459a8b46fc204529d70b603769f8a45aef4553df8a5c04b5698e77b7",
    "U/pascal/366/unlabeled.txt": "591c593546d1dbb65bd4d08ae99fabc1e9958d614c8079c8961422b8b7df7433",
    "U/pascal/732/labeled.txt": "02c8ec5b62e27364f5bc91eb95bccf54debaa721e9d31c50c07507aea258fd0f",
    "U/pascal/732/unlabeled.txt": "8ddf828ec616b551447dc402c2c53eb7d0044697a0b6bacd6190ee843ffbf340",
    "U/pascal/1464/labeled.txt": "b20486876df309c57c8230e957b2957fff5392ff5cb11f225e8453ed6c50ba3e",
    "U/pascal/1464/unlabeled.txt": "3ba331d08fee0751486a8be3f9f269f9efc09faa82a32a703bbb7deda4d66544",
    "U/cityscapes/1_30/labeled.txt": "b11041fef70476fb5564af0ef006a8013622da9cf49c7faf4182f3e26eb32742",
    "U/cityscapes/1_30/unlabeled.txt": "1b8a9b7bb4f9f6f06a3dffe766efe8b10a14a0137637af1738bbb417a5c85dbe",
    "U/pascal/u2pl_1_16/labeled.txt": "a58cf5eda18c8e060c8fef0233b388b488e62e5903076fed90b5bd34cf6735d3",
    "U/pascal/u2pl_1_16/unlabeled.txt": "4f038ee0eef3dc96863906821f2eb78c430941d9151ad78366fdbcc0b9e3aa8f",
    "U/pascal/u2pl_1_8/labeled.txt": "cebe5f2fda695dd72ff3336d6bfef95967c903fe4d404d9827a42c5fbc1dfd8a",
    "U/pascal/u2pl_1_8/unlabeled.txt": "fc4708a91ce72d15c1bf3515334abcc09d604f83f5110c12a5548af126e6f768",
    "U/pascal/u2pl_1_4/labeled.txt": "b740bcf1ac91477ff0df913594ea70a00ced359a007a4050cac487f136470fa4",
    "U/pascal/u2pl_1_4/unlabeled.txt": "43652ae8048ee32a75df1e27dd56147ad606d65a3721ac056294d6c7fb08ee06",
}
_CITYSCAPES_TRAIN = "T/city/config_new/train.txt"
_PSEUDOSEG = {"92": "1-16", "183": "1-8", "366": "1-4", "732": "1-2"}

# Every r-th id is labeled: of the sorted train_aug ids, or of Cityscapes' train.txt in its own order.
# (UniMatch's lists with these names contain the same ids.)
_EVERY_RTH = {
    **{f"cps/voc/1-{r}": r for r in (2, 4, 8, 16)},
    **{f"unimatch/voc/1-{r}": r for r in (4, 8, 16)},
    **{f"cps/cityscapes/1-{r}": r for r in (2, 4, 8, 16)},
    **{f"unimatch/cityscapes/1-{r}": r for r in (2, 4, 8, 16)},
}
# Name -> the lists of labeled and of unlabeled images.
_LISTS = {
    **{
        f"pseudoseg/voc/{name}": tuple(
            f"T/pascal_voc/subset_train_aug/pseudoseg_{side}_{ratio}.txt" for side in ("labeled", "unlabeled")
        )
        for count, ratio in _PSEUDOSEG.items()
        for name in (count, ratio)
    },
    **{
        f"unimatch/voc/{count}": (f"U/pascal/{count}/labeled.txt", f"U/pascal/{count}/unlabeled.txt")
        for count in (92, 183, 366, 732, 1464)
    },
    # 100 images, which are not every 30th:
    "unimatch/cityscapes/1-30": ("U/cityscapes/1_30/labeled.txt", "U/cityscapes/1_30/unlabeled.txt"),
    **{
        f"u2pl/voc/1-{r}": (f"U/pascal/u2pl_1_{r}/labeled.txt", f"U/pascal/u2pl_1_{r}/unlabeled.txt")
        for r in (4, 8, 16)
    },
    # All of Cityscapes' train set is labeled; images of train_extra are added.
    **{
        f"coarse-{count}": (_CITYSCAPES_TRAIN, f"T/city/config_new/coarse_split/train_extra_{count}.txt")
        for count in (3000, 6000, 9000)
    },
}
NAMES = (*_EVERY_RTH, *_LISTS)
"""The published partitions."""


@dataclass(frozen=True)
class Partition:
    """Two disjoint lists of ids; unpacks to `labeled_ids, unlabeled_ids`.

    Args:
        name: a value that selects it again; for list files only their names without folders.
    """

    name: str
    labeled_ids: tuple[str, ...]
    unlabeled_ids: tuple[str, ...]

    def __iter__(self) -> Iterator[tuple[str, ...]]:
        return iter((self.labeled_ids, self.unlabeled_ids))

    @property
    def sha256(self) -> str:
        """Hash of the sets, independent of their order: the line "labeled", the sorted labeled ids, the line
        "unlabeled", the sorted unlabeled ids, each line ended by a line feed, in UTF-8."""
        return _sha256_of_lines(["labeled", *sorted(self.labeled_ids), "unlabeled", *sorted(self.unlabeled_ids)])


def partition(
    spec: str | int,
    ids: Iterable[str],
    *,
    seed: int = 0,
    lists_dir: str | os.PathLike | None = None,
    base_url: str | None = None,
) -> Partition:
    """Split a data set's ids into labeled and unlabeled ones.

    Args:
        spec: one of
            a published name (`NAMES`), like "cps/voc/1-8" or "pseudoseg/voc/92";
            a ratio, "1-8" or "1/8": this share of `ids`, rounded up, drawn by `seed`;
            a count, "12": this many, drawn by `seed`. For the same seed, smaller sets are part of larger ones;
            a list file, "labeled.txt", or two, "labeled.txt,unlabeled.txt": one image per line, as its id or its path,
            optionally followed by its label's path, which is never opened. Without the second file, all other `ids`
            are unlabeled.
        ids: of all images in the data set.
        lists_dir: a folder with copies of published lists, at any depth (a clone of their repository, say); they are
            recognized by their content. Nothing is downloaded then.
        base_url: where to download published lists, instead of `$CPS_HF_LISTS_URL` or
            https://raw.githubusercontent.com.

    Returns:
        The partition. Ids that a list omits are on neither side.

    Raises:
        ValueError: there is no such partition; a formula is not defined for `ids`; a listed id is not in `ids`; a
            list has another hash than the published one; or nothing is labeled.
        ConnectionError: a list cannot be downloaded; the message says how to get it otherwise.
    """
    ids = list(ids)
    spec = str(spec).strip()
    name = spec.replace("_", "-")
    if len(set(ids)) < len(ids):
        twice = [image for image, count in Counter(ids).items() if count > 1]
        raise ValueError(f"`ids` must be unique; these occur more than once: {first_few(twice)}.")
    if name in _EVERY_RTH:
        if "/voc/" in name:
            _require_train_aug(name, ids)
            listed = sorted(ids)
        else:
            listed = _read_published(_CITYSCAPES_TRAIN, ids, lists_dir, base_url)
        labeled = listed[:: _EVERY_RTH[name]]
        chosen = set(labeled)
        unlabeled = [image for image in listed if image not in chosen]
    elif name in _LISTS:
        labeled, unlabeled = (_read_published(file, ids, lists_dir, base_url) for file in _LISTS[name])
    elif re.fullmatch(r"1[-/]\d+|\d+", name):
        labeled, unlabeled = _drawn(name.replace("/", "-"), ids, seed)
        name = f"{name.replace('/', '-')}, seed {seed}"
    else:
        files = [Path(spec)] if Path(spec).is_file() else [Path(part.strip()) for part in spec.split(",")]
        _require_files(spec, files)
        sides = [read_list(file.read_bytes(), str(file), ids) for file in files]
        labeled = sides[0]
        chosen = set(labeled)
        unlabeled = sides[1] if len(sides) == 2 else [image for image in ids if image not in chosen]
        name = ",".join(file.name for file in files)
    return _checked(name, labeled, unlabeled, ids)


def _checked(name: str, labeled: Sequence[str], unlabeled: Sequence[str], ids: Sequence[str]) -> Partition:
    known = set(ids)
    for side, listed in (("labeled", labeled), ("unlabeled", unlabeled)):
        missing = [image for image in dict.fromkeys(listed) if image not in known]
        if missing:
            raise ValueError(
                f"Partition {name}: {len(missing)} of {len(listed)} {side} images are not in the data set, which has "
                f"{len(ids)}: {first_few(missing)}. Complete the data set, or choose another partition."
            )
        if len(set(listed)) < len(listed):
            logger.warning("Partition %s: %d %s lines repeat an image.", name, len(listed) - len(set(listed)), side)
    if not labeled:
        raise ValueError(f"Partition {name} labels no image. At least one is needed.")
    chosen = set(labeled)
    both = [image for image in dict.fromkeys(unlabeled) if image in chosen]
    if both:
        logger.warning(
            "Partition %s: listed both as labeled and as unlabeled, so removed from the unlabeled images: %s.",
            name,
            first_few(both, 20),
        )
    result = Partition(
        name, tuple(dict.fromkeys(labeled)), tuple(image for image in dict.fromkeys(unlabeled) if image not in chosen)
    )
    logger.info(
        "Partition %s: %d labeled, %d unlabeled of %d images.",
        name,
        len(result.labeled_ids),
        len(result.unlabeled_ids),
        len(ids),
    )
    return result


def _require_train_aug(name: str, ids: Sequence[str]) -> None:
    found = _sha256_of_lines(sorted(ids))
    if found != TRAIN_AUG_SHA256:
        raise ValueError(
            f"{name} is defined on the {TRAIN_AUG_SIZE} ids of VOC's train_aug (SHA-256 {TRAIN_AUG_SHA256}); the data "
            f"set has {len(ids)} ids ({found}). Build train_aug with `python -m cps_hf.data.voc --help`, or draw a "
            f"partition of these images by the ratio alone: {name.rsplit('/', 1)[1]}."
        )


def _drawn(name: str, ids: Sequence[str], seed: int) -> tuple[list[str], list[str]]:
    """The first ids in an order given by hashes: no random generator, so the result is the same everywhere.

    Both sides keep the order of `ids`.
    """
    if "-" in name:
        denominator = int(name.split("-")[1])
        if denominator < 1:
            raise ValueError(f"The ratio {name} is invalid. Give one like 1-8.")
        count = -(-len(ids) // denominator)  # rounded up, as every r-th id would give
    else:
        count = int(name)
        if count > len(ids):
            raise ValueError(f"{count} labeled images are requested, but there are only {len(ids)}.")
    order = sorted(ids, key=lambda image: hashlib.sha256(f"{seed}/{image}".encode()).digest())
    chosen = set(order[:count])
    return [image for image in ids if image in chosen], [image for image in ids if image not in chosen]


def _require_files(spec: str, files: Sequence[Path]) -> None:
    absent = [str(file) for file in files if not file.is_file()]
    if absent or len(files) > 2:
        near = difflib.get_close_matches(spec.replace("_", "-"), NAMES, n=3, cutoff=0.6)
        raise ValueError(
            f"`partition` {spec!r} is not a published partition, a ratio (1-8), a count (12) or a list file"
            + (f" ({', '.join(absent)} does not exist)" if absent else "")
            + (f". Did you mean {' or '.join(near)}?" if near else f". Published ones: {', '.join(NAMES)}.")
        )


# --------------------------------------------------------------------------------------------------- reading lists


def read_list(content: bytes, source: str, ids: Collection[str]) -> list[str]:
    """The ids of a list, in its order. Lines may end in CRLF; empty lines are ignored.

    Raises:
        ValueError: it is not text, or a line is not an image name.
    """
    try:
        lines = content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is not a list of images in UTF-8 text: {error}.") from error
    known, found = set(ids), []
    for number, line in enumerate(lines, 1):
        line = line.strip()
        if not line:
            continue
        image = _id_of(line, known)
        if not image or ".." in re.split(r"[/\\\s]", line) or re.search(r"[\x00-\x08\x0e-\x1f\x7f]", line):
            raise ValueError(f"{source}, line {number}: {line[:80]!r} is not an image id or path.")
        found.append(image)
    return found


def _id_of(line: str, known: Collection[str]) -> str:
    """The id that a line of a list means. The line is only compared with ids, never opened.

    These are compared with the known ids: the whole line, the text before a tab, the text before a space; each as it
    is, without the image's suffix, and without leading folders one by one. If none is known, the shortest of these.
    """
    image = ""
    for text in (line, line.split("\t")[0], line.split()[0]):
        if text in known:
            return text
        stem = re.sub(r"(_leftImg8bit)?\.(png|jpe?g|bmp|tiff?|webp)$", "", text, flags=re.IGNORECASE)
        parts = [part for part in re.split(r"[/\\]", stem) if part]
        for start in range(len(parts)):
            image = "/".join(parts[start:])
            if image in known:
                return image
    return image


def _read_published(file: str, ids: Sequence[str], lists_dir, base_url: str | None) -> list[str]:
    content = _from_folder(file, Path(lists_dir)) if lists_dir is not None else _from_cache(file, base_url)
    return read_list(content, file, ids)


def _from_folder(file: str, folder: Path) -> bytes:
    wrong = []
    for path in sorted(folder.rglob(Path(file).name)):
        content = path.read_bytes()
        found = hashlib.sha256(content).hexdigest()
        if found == _SHA256[file]:
            return content
        wrong.append(f"{path} has {found}")
    raise ValueError(
        f"{folder} contains no {file[2:]} as published (SHA-256 {_SHA256[file]}): "
        + (first_few(wrong, 3) if wrong else f"no file there is called {Path(file).name}")
        + f". Get it from {_url(file, None)}."
    )


def _from_cache(file: str, base_url: str | None) -> bytes:
    """The list, downloaded unless the cache has the right one."""
    path = Path(constants.HF_HOME) / "cps_hf" / "partitions" / file
    if path.is_file():
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() == _SHA256[file]:
            return content
        logger.warning("%s is not the published list: downloading it again.", path)
    url = _url(file, base_url)
    otherwise = f"Download it where there is a network and put it at {path}, or pass its folder as `lists_dir`."
    if constants.HF_HUB_OFFLINE:
        raise ConnectionError(f"{url} is not in the cache, and HF_HUB_OFFLINE is set. {otherwise}")
    logger.info("Downloading %s.", url)
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            content = answer.read()
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: not a URL
        raise ConnectionError(f"{url} cannot be downloaded: {type(error).__name__}: {error}. {otherwise}") from error
    found = hashlib.sha256(content).hexdigest()
    if found != _SHA256[file]:
        raise ValueError(f"{url} has SHA-256 {found}, expected {_SHA256[file]}: rejected. {otherwise}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as temporary:  # processes may download at the same time
            temporary.write_bytes(content)
    except OSError as error:  # a full or read-only disk; the list itself was downloaded
        logger.warning("%s cannot be cached: %s.", path, error)
    return content


def _url(file: str, base_url: str | None) -> str:
    base = base_url or os.environ.get(URL_VARIABLE) or "https://raw.githubusercontent.com"
    return f"{base.rstrip('/')}/{_SOURCES[file[0]]}/{file[2:]}"


def _sha256_of_lines(lines: Iterable[str]) -> str:
    return hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()
