"""Score a branch, or the mean of several, on a labeled set, or write the predictions in an official format.

    python examples/evaluate_branch.py --branches outputs/train_cps/best
    python examples/evaluate_branch.py --branches A B --each --dataset cityscapes --data_root DIR \\
        --mode sliding --crop_size 800 800 --scales 0.5 1.0 1.75 --flip

The same as `cps-hf evaluate`.
"""

import sys

from cps_hf.commands.evaluate import main

if __name__ == "__main__":
    main(sys.argv[1:])
