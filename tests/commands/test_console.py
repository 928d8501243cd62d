"""A console that cannot encode a class name does not end a command."""

import io
import sys

import pytest

from cps_hf.commands.console import print_any_text
from cps_hf.training.reporting import scores_table

NAMES = ["background", "道路", "côté"]
ROW = {"per_category_iou": [0.5, 0.25, 1.0], "mean_iou": 0.5, "mean_accuracy": 0.5, "overall_accuracy": 0.5}


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_a_table_is_printed_in_any_encoding(monkeypatch, encoding):
    written = {name: io.BytesIO() for name in ("stdout", "stderr")}
    for name, file in written.items():
        monkeypatch.setattr(sys, name, io.TextIOWrapper(file, encoding=encoding))
    table = scores_table({"branch_0": ROW}, NAMES)
    if encoding != "utf-8":
        with pytest.raises(UnicodeEncodeError):
            sys.stdout.write(table)
            sys.stdout.flush()
    print_any_text()
    for stream in (sys.stdout, sys.stderr):
        stream.write(f"{table}\n")
        stream.flush()
    for file in written.values():
        lines = file.getvalue().decode(encoding).splitlines()
        shown = {
            "utf-8": ["道路", "côté"],
            "cp1252": ["\\u9053\\u8def", "côté"],
            "ascii": ["\\u9053\\u8def", "c\\xf4t\\xe9"],
        }
        assert [line.split() for line in lines[-6:-4]] == [
            [name, value] for name, value in zip(shown[encoding], ["25.00", "100.00"], strict=True)
        ]


def test_a_process_without_a_console_has_nothing_to_set(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    print_any_text()
