"""Small helpers of the loaders: what an error shows can be typed."""

import json
import re

from cps_hf.data.table import as_typed


def test_options_are_shown_as_python_and_as_a_command_line_take_them():
    said = as_typed(values={0: 0, 255: 1}, resize_masks=True, colors={(1, 2, 3): 0})
    python, typed = re.fullmatch(r"`(.*?)` \(on a command line `--load_options '(.*)'`\)", said).groups()
    assert eval(f"dict({python})") == {"values": {0: 0, 255: 1}, "resize_masks": True, "colors": {(1, 2, 3): 0}}
    assert json.loads(typed) == {"values": {"0": 0, "255": 1}, "resize_masks": True, "colors": {"1, 2, 3": 0}}
