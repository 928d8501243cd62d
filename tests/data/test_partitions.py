"""Which images a partition labels: the released lists, formulas, ratios, counts and list files."""

import hashlib
import logging
import os
import re
from pathlib import Path

import pytest

from cps_hf.data import partitions
from cps_hf.data.partitions import NAMES, Partition, partition

RELEASED = Path(__file__).parents[3] / "shared" / "partitions"  # a copy of the released lists, next to the repository
needs_lists = pytest.mark.skipif(not RELEASED.is_dir(), reason="the released lists are not here")
IDS = [f"img_{i:03d}" for i in range(100)]


def column(path, pattern):
    """The ids of a released list, read without the code under test."""
    lines = (RELEASED / path).read_bytes().decode().replace("\r\n", "\n").strip().split("\n")
    return [re.fullmatch(pattern, line)[1] for line in lines]


VOC_LINE = r"(?:JPEGImages/)?(\d{4}_\d{6})(?:\.jpg SegmentationClass/\1\.png)?"
CITY_LINE = r"(?:/images/train(?:_extra)?/|leftImg8bit/train/\w+/)([\w-]+?_\d+_\d+)(?:_leftImg8bit)?\.png[\t ].*"


@pytest.fixture(scope="module")
def voc():
    return column("unimatch/pascal/train_aug.txt", VOC_LINE)


@pytest.fixture(scope="module")
def cityscapes():
    return column("torchsemiseg/city/train.txt", CITY_LINE)


# ---------------------------------------------------------------------------------------------- published partitions


@needs_lists
def test_the_hashes_match_the_released_files():
    known = {hashlib.sha256(path.read_bytes()).hexdigest() for path in RELEASED.rglob("*.txt")}
    assert set(partitions._SHA256.values()) <= known and len(set(partitions._SHA256.values())) == len(
        partitions._SHA256
    )


@needs_lists
@pytest.mark.parametrize("ratio", [2, 4, 8, 16])
def test_the_formulas_give_the_released_voc_lists(ratio, voc):
    labeled, unlabeled = partition(f"cps/voc/1-{ratio}", reversed(voc))
    folder = "torchsemiseg/pascal_voc/train_aug_"
    assert list(labeled) == column(f"{folder}labeled_1-{ratio}.txt", VOC_LINE)
    assert list(unlabeled) == column(f"{folder}unlabeled_1-{ratio}.txt", VOC_LINE)
    if ratio != 2:
        labeled, unlabeled = partition(f"unimatch/voc/1_{ratio}", voc)
        assert list(labeled) == column(f"unimatch/pascal/1_{ratio}/labeled.txt", VOC_LINE)
        assert list(unlabeled) == column(f"unimatch/pascal/1_{ratio}/unlabeled.txt", VOC_LINE)


@needs_lists
@pytest.mark.parametrize("ratio", [2, 4, 8, 16, 30])
def test_cityscapes_partitions_are_the_released_lists(ratio, cityscapes):
    labeled, unlabeled = partition(f"unimatch/cityscapes/1-{ratio}", sorted(cityscapes), lists_dir=RELEASED)
    assert list(labeled) == column(f"unimatch/cityscapes/1_{ratio}/labeled.txt", CITY_LINE)
    assert list(unlabeled) == column(f"unimatch/cityscapes/1_{ratio}/unlabeled.txt", CITY_LINE)
    if ratio != 30:
        again = partition(f"cps/cityscapes/1-{ratio}", cityscapes, lists_dir=RELEASED)
        folder = "torchsemiseg/city/subset_train/train_aug_"
        assert list(again.labeled_ids) == column(f"{folder}labeled_1-{ratio}.txt", CITY_LINE)
        assert list(again.unlabeled_ids) == column(f"{folder}unlabeled_1-{ratio}.txt", CITY_LINE)
        assert again.sha256 == Partition("x", labeled, unlabeled).sha256


@needs_lists
@pytest.mark.parametrize(
    "name, files, counts",
    [
        *[(f"unimatch/voc/{n}", f"unimatch/pascal/{n}/{{}}.txt", (n, 10582 - n)) for n in (92, 183, 366, 732, 1464)],
        *[
            (f"u2pl/voc/1-{r}", f"unimatch/pascal/u2pl_1_{r}/{{}}.txt", (n, 10582 - n))
            for r, n in ((4, 2646), (8, 1323), (16, 662))
        ],
    ],
)
def test_published_lists_are_read_unchanged(name, files, counts, voc):
    labeled, unlabeled = partition(name, voc, lists_dir=RELEASED)
    assert (len(labeled), len(unlabeled)) == counts
    assert list(labeled) == column(files.format("labeled"), VOC_LINE)
    assert list(unlabeled) == column(files.format("unlabeled"), VOC_LINE)


@needs_lists
@pytest.mark.parametrize(
    "count, ratio, pool, both",
    [
        (92, "1-16", 1372, "2008_004822"),
        (183, "1-8", 1281, "2009_001036"),
        (366, "1-4", 1098, "2007_000032"),
        (732, "1-2", 732, "2009_000662"),
    ],
)
def test_the_id_listed_twice_by_pseudoseg_stays_labeled(count, ratio, pool, both, voc, caplog):
    with caplog.at_level(logging.WARNING, logger="cps_hf"):
        found = partition(f"pseudoseg/voc/{count}", voc, lists_dir=RELEASED)
    assert (len(found.labeled_ids), len(found.unlabeled_ids)) == (count, pool)
    assert both in found.labeled_ids and both not in found.unlabeled_ids
    assert [both in r.message for r in caplog.records] == [True]
    assert partition(f"pseudoseg/voc/{ratio}", voc, lists_dir=RELEASED).sha256 == found.sha256
    unimatch = partition(f"unimatch/voc/{count}", voc, lists_dir=RELEASED)
    shared = len(set(found.labeled_ids) & set(unimatch.labeled_ids))
    assert shared == (371 if count == 732 else count), "UniMatch's 732 is another list"


@pytest.fixture(scope="module")
def extra():
    lists = {n: column(f"torchsemiseg/city/coarse_split/train_extra_{n}.txt", CITY_LINE) for n in (3000, 6000, 9000)}
    assert lists[3000] == lists[9000][::3] == lists[6000][::2]
    return lists


@needs_lists
@pytest.mark.parametrize("count", [3000, 6000, 9000])
def test_coarse_partitions_add_unlabeled_images_to_the_whole_train_set(count, cityscapes, extra):
    labeled, unlabeled = partition(f"coarse-{count}", cityscapes + extra[count], lists_dir=RELEASED)
    assert list(labeled) == cityscapes and list(unlabeled) == extra[count]
    with pytest.raises(ValueError, match="2975 of 2975 labeled images are not in the data set"):
        partition(f"coarse-{count}", extra[count], lists_dir=RELEASED)


@needs_lists
def test_every_published_partition_has_two_disjoint_sides(voc, cityscapes, extra):
    streets = [*cityscapes, *dict.fromkeys(extra[9000] + extra[6000])]
    hashes = {}
    for name in NAMES:
        ids = voc if "/voc/" in name else streets
        found = partition(name, ids, lists_dir=RELEASED)
        assert found.name == name and found.labeled_ids and found.unlabeled_ids
        assert not set(found.labeled_ids) & set(found.unlabeled_ids)
        hashes.setdefault(found.sha256, []).append(name)
    # Only these sets occur under several names.
    assert sorted(sorted(names) for names in hashes.values() if len(names) > 1) == sorted(
        [
            *[[f"cps/voc/1-{r}", f"unimatch/voc/1-{r}"] for r in (4, 8, 16)],
            *[[f"cps/cityscapes/1-{r}", f"unimatch/cityscapes/1-{r}"] for r in (2, 4, 8, 16)],
            *[
                [f"pseudoseg/voc/{r}", f"pseudoseg/voc/{n}"]
                for r, n in (("1-16", 92), ("1-8", 183), ("1-4", 366), ("1-2", 732))
            ],
        ]
    )


@needs_lists
def test_voc_partitions_reject_another_set_of_ids(voc):
    with pytest.raises(ValueError, match=r"the data set has 10581 ids .*1-8\.$"):
        partition("cps/voc/1-8", voc[1:])
    with pytest.raises(ValueError, match="the data set has 10582 ids"):
        partition("unimatch/voc/1-8", [*voc[1:], "2099_000001"])
    with pytest.raises(ValueError, match=r"1 of 92 labeled images are not in the data set, .*2007_000733"):
        partition("unimatch/voc/92", [image for image in voc if image != "2007_000733"], lists_dir=RELEASED)


def test_every_rth_id_is_labeled_in_voc_and_cityscapes(tmp_path, monkeypatch):
    """The formulas, applied to a few ids instead of the published ones."""
    ids = ["f", "b", "e", "a", "d", "c"]
    monkeypatch.setattr(partitions, "TRAIN_AUG_SHA256", hashlib.sha256(b"a\nb\nc\nd\ne\nf\n").hexdigest())
    assert [*partition("cps/voc/1-4", ids)] == [("a", "e"), ("b", "c", "d", "f")]
    with pytest.raises(ValueError, match=r"the data set has 5 ids .*1-4\.$"):
        partition("cps/voc/1-4", ids[1:])
    train = b"f\nb\ne\na\nd\n"
    monkeypatch.setitem(partitions._SHA256, partitions._CITYSCAPES_TRAIN, hashlib.sha256(train).hexdigest())
    (tmp_path / "train.txt").write_bytes(train)
    found = partition("cps/cityscapes/1-2", sorted(ids), lists_dir=tmp_path)
    assert [*found] == [("f", "e", "d"), ("b", "a")], "c is from another list"


# --------------------------------------------------------------------------------------------- ratios, counts, hashes


def test_a_seeded_ratio_is_part_of_every_larger_one():
    sides = [set(partition(spec, IDS, seed=3).labeled_ids) for spec in (1, "1-30", "1/16", "1_8", "17", "1-2", 100)]
    assert [len(side) for side in sides] == [1, 4, 7, 13, 17, 50, 100], "rounded up"
    assert all(small < large for small, large in zip(sides, sides[1:], strict=False))


def test_the_drawn_ids_depend_only_on_seed_and_ids():
    labeled, unlabeled = partition("12", IDS, seed=1)
    assert [image for image in IDS if image in labeled or image in unlabeled] == IDS
    assert [*labeled] == sorted(labeled) and [*unlabeled] == sorted(unlabeled), "in the order of `ids`"
    again = partition("12", IDS[::-1], seed=1)
    assert set(again.labeled_ids) == set(labeled) != set(partition("12", IDS, seed=2).labeled_ids)
    # The expected order comes from fixed hashes: another Python or another machine draws the same.
    order = sorted(IDS, key=lambda i: hashlib.sha256(f"1/{i}".encode()).hexdigest())
    assert set(labeled) == set(order[:12])
    # Seeds spread over all ids: each is labeled in about a fifth of 200 draws of 20 (4.5 standard deviations).
    draws = [partition(20, IDS, seed=seed).labeled_ids for seed in range(200)]
    shares = [sum(image in draw for draw in draws) / 200 for image in IDS]
    assert max(abs(share - 0.2) for share in shares) < 4.5 * (0.2 * 0.8 / 200) ** 0.5


def test_the_hash_covers_both_sets():
    found = partition("2", ["b", "c", "a"], seed=0)
    text = "".join(
        f"{i}\n" for i in ["labeled", *sorted(found.labeled_ids), "unlabeled", *sorted(found.unlabeled_ids)]
    )
    assert found.sha256 == hashlib.sha256(text.encode()).hexdigest()
    assert partition("2", ["a", "b", "c"], seed=0).sha256 == found.sha256
    assert Partition("x", ("a",), ("b", "c")).sha256 != Partition("x", ("b",), ("a", "c")).sha256
    assert Partition("x", ("b", "a"), ("d", "c")).sha256 == Partition("x", ("a", "b"), ("c", "d")).sha256
    assert Partition("x", ("a",), ()).sha256 != Partition("x", (), ("a",)).sha256
    assert (found.name, partition("1/2", IDS, seed=4).name) == ("2, seed 0", "1-2, seed 4")


@pytest.mark.parametrize(
    "spec, message",
    [
        ("0", "labels no image"),
        ("1-0", "ratio 1-0 is invalid"),
        ("101", "101 labeled images are requested, but there are only 100"),
        ("cps/voc/1-3", r"not a published partition.*Did you mean cps/voc/1-"),
        ("pseudoseg/voc/93", r"Did you mean pseudoseg/voc/9?"),
        ("nowhere.txt", r"nowhere.txt does not exist.*Published ones: cps/voc/1-2"),
        ("2-8", "a ratio"),
        ("", "or a list file"),
    ],
)
def test_an_invalid_partition_lists_valid_ones(spec, message):
    with pytest.raises(ValueError, match=message):
        partition(spec, IDS)


def test_ids_given_twice_are_an_error():
    with pytest.raises(ValueError, match="more than once: img_004"):
        partition("3", [*IDS, "img_004"])


# ---------------------------------------------------------------------------------------------------------- list files


@pytest.mark.parametrize(
    "line, image",
    [
        ("2007_000032", "2007_000032"),
        ("/images/train/jena_000078_000019.png\t/segmentation/train/jena_000078_000019_gtFine.png", None),
        ("leftImg8bit/train/jena/jena_000078_000019_leftImg8bit.png gtFine/x/jena_gtFine_labelTrainIds.png", None),
        ("JPEGImages/2007_000733.jpg SegmentationClass/2007_000733.png", "2007_000733"),
        ("leftImg8bit/train_extra/augsburg/augsburg_000000_000000_leftImg8bit.png None", "augsburg_000000_000000"),
        ("leftImg8bit/train/jena/jena_000078_000019_leftImg8bit.png", None),
        ("/home/someone/data/jena_000078_000019_leftImg8bit.png", None),
        ("C:\\data\\jena_000078_000019.PNG", None),
        ("north/tile 7.tif", "north/tile 7"),
        ("images/north/tile 7.tif\tmasks/north/tile 7.png", "north/tile 7"),
        ("scan.v2", "scan.v2"),
        ("photos/scan.v2.jpeg", "scan.v2"),
    ],
)
def test_a_line_of_any_format_means_an_id(line, image, tmp_path):
    image = image or "jena_000078_000019"
    others = ["other", "7", "north/tile 8", "augsburg", "2007_000734"]
    for end in ("\n", "\r\n", ""):
        (tmp_path / "list.txt").write_bytes(f"{line}{end}".encode())
        assert partition(str(tmp_path / "list.txt"), [*others, image]).labeled_ids == (image,)


def test_two_files_name_both_sides_one_leaves_the_rest(tmp_path, caplog):
    (tmp_path / "labeled.txt").write_bytes(
        b"\xef\xbb\xbfimg_003.png\r\n\r\nimg_001.png"
    )  # BOM, CRLF, no final newline
    (tmp_path / "unlabeled.txt").write_text("img_001\nimg_007\nimg_007\nimg_009\n")
    with caplog.at_level(logging.WARNING, logger="cps_hf"):
        one = partition(str(tmp_path / "labeled.txt"), IDS)
    assert not caplog.records
    assert one.labeled_ids == ("img_003", "img_001") and len(one.unlabeled_ids) == 98
    assert one.name == "labeled.txt", "without its folder"
    with caplog.at_level(logging.WARNING, logger="cps_hf"):
        both = partition(f"{tmp_path}/labeled.txt, {tmp_path}/unlabeled.txt", IDS)
    assert both.labeled_ids == ("img_003", "img_001") and both.unlabeled_ids == ("img_007", "img_009")
    assert both.name == "labeled.txt,unlabeled.txt"
    assert "removed from the unlabeled images: img_001." in caplog.text and "1 unlabeled lines repeat" in caplog.text


@pytest.mark.parametrize(
    "content, message",
    [
        (b"img_001\nimg_900.png\nimg_901.png\n", r"2 of 3 labeled images are not in the data set.*img_900, img_901"),
        (b"\r\n \n", "labels no image"),
        (b"img_001\n../../img_002.png\n", r"line 2: '\.\./\.\./img_002\.png' is not an image id or path"),
        (b"img_001 ../labels/img_001.png\n", "line 1"),
        (b"///\n", "line 1"),
        (b"img_001\x00\n", "line 1"),
        (b"\x89PNG\r\n\xff\xfe", "not a list of images in UTF-8"),
    ],
)
def test_an_invalid_list_names_file_and_line(content, message, tmp_path):
    (tmp_path / "labeled.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        partition(str(tmp_path / "labeled.txt"), IDS)
    assert "labeled.txt" in str(error.value)


def test_listed_paths_are_never_opened(tmp_path):
    """Opening a named pipe without a writer would block."""
    os.mkfifo(tmp_path / "img_001.png")
    (tmp_path / "labeled.txt").write_text(f"{tmp_path}/img_001.png\t{tmp_path}/img_001.png\n")
    assert partition(str(tmp_path / "labeled.txt"), IDS).labeled_ids == ("img_001",)
