"""Write a data set as parquet shards, for streaming from a disk or from the Hub.

    python examples/prepare_dataset.py --dataset cityscapes --data_root DIR --split train --output_dir shards

The same as `cps-hf prepare`.
"""

import sys

from cps_hf.commands.prepare import main

if __name__ == "__main__":
    main(sys.argv[1:])
