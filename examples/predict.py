"""Predict images: masks, overlays with a legend and, optionally, the probabilities of every class.

    python examples/predict.py --branches outputs/train_cps/best --inputs photos 'more/*/img_*.jpg' one.png

The same as `cps-hf predict`.
"""

import sys

from cps_hf.commands.predict import main

if __name__ == "__main__":
    main(sys.argv[1:])
