"""inference_memory.py: its arguments."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import inference_memory  # noqa: E402


@pytest.mark.parametrize(("word", "status"), [("--help", 0), ("no such way", 2)])
def test_an_unknown_way_of_predicting_lists_the_known_ones(capsys, word, status):
    with pytest.raises(SystemExit) as ended:
        inference_memory.main([word])
    assert ended.value.code == status
    said = " ".join("".join(capsys.readouterr()).split())
    assert "whole image, two networks" in said and "sliding windows, flip" in said
