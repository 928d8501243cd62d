"""A page to try branches on: drop an image; see the overlay, the classes' shares, and where two branches differ.

    python examples/app.py outputs/train_cps                  # a run's folder: best, branch_0, branch_1, teacher
    python examples/app.py outputs/a/best user/name           # two branches, folders or names on the Hub

It serves http://127.0.0.1:7860. Any model of AutoModelForSemanticSegmentation will do. Needs
`pip install "cps_hf[app]"`; `--help` lists all options.
"""

from cps_hf.app import main

if __name__ == "__main__":
    main()
