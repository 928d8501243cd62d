"""Prints the lowest release of each dependency that pyproject.toml allows, as constraints for pip.

python .ci/oldest.py > oldest.txt && pip install -c oldest.txt .
"""

import re
import tomllib
from pathlib import Path


def oldest(dependencies: list[str]) -> list[str]:
    """`name==1.2` for each `name>=1.2`.

    Raises:
        ValueError: If a dependency has no lower bound, or further conditions.
    """
    pins = []
    for dependency in dependencies:
        found = re.fullmatch(r"([\w.-]+)>=([\w.]+)", dependency)
        if not found:
            raise ValueError(f"pyproject.toml: the dependency `{dependency}` should have the form `name>=version`.")
        pins.append("{}=={}".format(*found.groups()))
    return pins


if __name__ == "__main__":
    pyproject = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    print("\n".join(oldest(pyproject["project"]["dependencies"])))
