"""`cps-hf export`: the file, the printed summary, and one-line errors."""

import re

import numpy as np
import pytest
from support.full_disk import full_disk
from support.toy import tiny_branch

from cps_hf.commands.export import main
from cps_hf.inference.onnx import onnx_predictor


def test_the_branch_is_exported_and_its_input_sizes_reported(tmp_path, capsys):
    folder = tiny_branch(tmp_path / "branch", 3)
    main([str(folder), str(tmp_path / "out.onnx"), "--size", "64", "96"])
    full = tmp_path / "full"
    full.mkdir()
    said = capsys.readouterr().out
    assert "any height and width" in said and re.search(r"differ by at most \d.*\(1 x 64 x 96, 2 x 64 x 96", said)
    for words, message in (
        ([str(tmp_path / "nothing"), "x.onnx"], "no model could be read, since there is no such folder."),
        ([str(full), "x.onnx"], "no model could be read, since there is no config.json in it."),
        ([str(tmp_path), "x.onnx"], f"no model could be read, since it contains several. Give one: {folder}."),
        ([str(folder), str(tmp_path / "small.onnx"), "--size", "0", "64"], "cannot process images of 0 x 64"),
        ([str(folder), str(tmp_path / "out.onnx" / "x.onnx")], "out.onnx: expected a folder, found a file"),
        ([str(folder), str(full)], f"error: {full}: expected a file, found a folder. Choose another name."),
        ([str(folder), str(full / "x.onnx")], f"error: {full / 'x.onnx'}: No space left on device."),
    ):
        with full_disk(full / "x.onnx"), pytest.raises(SystemExit, match="2"):
            main(words)
        assert message in capsys.readouterr().err
    image = np.zeros((1, 3, 33, 47), np.float32)
    assert onnx_predictor(tmp_path / "out.onnx")(image).shape == (1, 3, 33, 47)
