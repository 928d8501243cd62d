"""Put a branch on the Hub: weights, config, image processor, model card and, for our own architectures, code.

    python examples/push_branch.py outputs/train_cps/best --repo_id USER/NAME --private

It is `cps-hf push`; needs a token that may write: `hf auth login`, or HF_TOKEN.
"""

import sys

from cps_hf.commands.push import main

if __name__ == "__main__":
    main(sys.argv[1:])
