"""Put a branch on the Hub: weights, config, image processor, model card and, for our own architectures, code.

    python examples/push_branch.py outputs/train_cps/best --repo_id USER/NAME --private
    python examples/push_branch.py outputs/train_cps/best --repo_id USER/NAME --revision v2 --tag v2.0
    python examples/push_branch.py outputs/train_cps/best --repo_id USER/NAME --space FOLDER   # and a page to try it

One commit. It needs a token that may write: `hf auth login`, or HF_TOKEN. `--help` lists all options.
"""

from cps_hf.hub.push import main

if __name__ == "__main__":
    main()
