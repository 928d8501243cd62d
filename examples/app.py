"""A page for trying branches: drop an image; see the overlay, the share of each class, and where two branches differ.

    python examples/app.py outputs/train_cps                  # a run's folder: best, branch_0, branch_1, teacher

The same as `cps-hf app`. Needs `pip install "cps_hf[app]"`.
"""

import sys

from cps_hf.commands.app import main

if __name__ == "__main__":
    main(sys.argv[1:])
