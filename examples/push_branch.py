"""Push a branch to the Hub: weights, config, image processor, model card and, for cps_hf's architectures, code.

    python examples/push_branch.py outputs/train_cps/best --repo_id USER/NAME --private

The same as `cps-hf push`. Needs a token with write access: `hf auth login`, or HF_TOKEN.
"""

import sys

from cps_hf.commands.push import main

if __name__ == "__main__":
    main(sys.argv[1:])
