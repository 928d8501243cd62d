"""Small helpers of the loaders: suggestions in errors can be typed."""

import json
import re

from cps_hf.data.table import as_typed


def test_options_are_shown_for_python_and_command_line():
    said = as_typed(values={0: 0, 255: 1}, resize_masks=True, colors={(1, 2, 3): 0})
    python, typed = re.fullmatch(r"`(.*?)` \(on a command line `--load_options '(.*)'`\)", said).groups()
    assert eval(f"dict({python})") == {"values": {0: 0, 255: 1}, "resize_masks": True, "colors": {(1, 2, 3): 0}}
    assert json.loads(typed) == {"values": {"0": 0, "255": 1}, "resize_masks": True, "colors": {"1, 2, 3": 0}}
