"""`cps-hf prepare`: the number of shards it writes, and the confirmation it requires before sharing data."""

import json

import pytest
from support.toy import NAMES, write_world

from cps_hf.commands.prepare import main
from cps_hf.data import load_hub

SIZES = [(20, 31), (33, 18), (25, 25), (12, 40), (31, 20)]


def test_shards_are_counted_and_sharing_needs_confirmation(tmp_path, capsys):
    world = tmp_path / "set"
    write_world(world / "images", SIZES)
    (world / "masks").mkdir()
    for path in (world / "images").glob("*_label.png"):
        path.rename(world / "masks" / path.name.replace("_label", ""))
    (world / "classes.json").write_text(json.dumps(NAMES))
    words = ["--dataset", "folder", "--data_root", str(tmp_path / "set"), "--load_options", '{"images": "images"}']
    words = [*words, "--rows_per_shard", "2", "--output_dir", str(tmp_path / "out")]
    main([*words[:-1], str(tmp_path / "flat")])  # a folder without splits becomes one split named train
    assert "3 written, 0 there already" in capsys.readouterr().out and len(load_hub(tmp_path / "flat", "train")) == 5
    words = [*words, "--split", "train"]
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert "error: No split 'train'" in capsys.readouterr().err
    (tmp_path / "all").mkdir()
    world.rename(tmp_path / "all" / "train")
    words[words.index(str(world))] = str(tmp_path / "all")
    main(words)
    printed = capsys.readouterr()
    assert "5 rows (image, label, id) in 3 shards" in printed.out and "3 written, 0 there already" in printed.out
    assert "3/3" in printed.err
    main(words)
    assert "0 written, 3 there already" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main(["--dataset", "cityscapes", "--data_root", "x", "--push_to_hub", "me/city"])
    said = capsys.readouterr().err
    assert "may not be passed on" in said and "--i_may_share" in said
    with pytest.raises(SystemExit, match="2"):
        main(["--dataset", "folder", "--data_root", "x"])
    assert "give either --output_dir or --push_to_hub" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main([*words, "--public"])
    assert "--public requires --push_to_hub" in capsys.readouterr().err
