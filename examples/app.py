"""A page to try branches on: drop an image; see the overlay, the classes' shares, and where two branches differ.

    python examples/app.py outputs/train_cps                  # a run's folder: best, branch_0, branch_1, teacher

It is `cps-hf app`; needs `pip install "cps_hf[app]"`.
"""

import sys

from cps_hf.commands.app import main

if __name__ == "__main__":
    main(sys.argv[1:])
