"""Check a data set before training: counts, sizes, class shares, broken files, a contact sheet.

    python examples/check_dataset.py DIR --split train                       # DIR/train/{images,masks}
    python examples/check_dataset.py DIR --images_only                       # unlabeled images: DIR/images

The same as `cps-hf check`.
"""

import sys

from cps_hf.commands.check import main

if __name__ == "__main__":
    main(sys.argv[1:])
