"""Imports point one way: the syntax trees say who imports whom."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "cps_hf"
HEAVY = {"transformers", "accelerate", "datasets", "evaluate", "huggingface_hub", "torchvision", "timm", "PIL"}

# Who may import which rooms of ours, and which libraries beside torch, numpy and the standard library.
ALLOWED = {
    "strided": (set(), set()),
    "losses": ({"strided"}, set()),
    "cutmix": (set(), set()),
    "ema": (set(), set()),
    "config": (set(), set()),
    "objectives": ({"losses", "strided", "cutmix", "objectives"}, set()),
    "modeling": ({"modeling"}, {"transformers", "timm", "huggingface_hub"}),
    "metrics": (set(), {"evaluate", "datasets"}),
    "data": ({"cutmix", "colors", "data", "lettering"}, {"datasets", "torchvision", "PIL", "huggingface_hub"}),
    "inference": ({"modeling"}, {"transformers"}),
    "cli": ({"config", "objectives"}, set()),
    "hub": ({"card", "push", "checkpoints"}, {"transformers"}),
    "card": (set(), {"huggingface_hub"}),
    "push": ({"space"}, {"huggingface_hub"}),
    "app": ({"data", "ensemble", "inference", "visualization", "app_page"}, {"PIL"}),
    "space": ({"app"}, set()),
    "onnx_export": ({"modeling"}, {"transformers"}),
    "pushing": ({"card", "push", "config", "checkpoints"}, {"huggingface_hub"}),
    "colors": (set(), set()),
    "ensemble": ({"inference", "modeling"}, {"transformers"}),
    "self_training": ({"data", "ensemble", "inference", "visualization", "checkpoints"}, {"datasets", "PIL"}),
    "lettering": (set(), {"PIL"}),
    "visualization": ({"colors", "lettering"}, {"PIL"}),
    "checkpoints": (set(), set()),
}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> tuple[set[str], set[str]]:
    """(rooms of ours, libraries) that a file imports, anywhere in it."""
    package = ["cps_hf", *path.relative_to(PACKAGE).parts[:-1]]
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names += [f"{module}.{alias.name}" for alias in node.names]
    ours = {name.split(".")[1] for name in names if name.startswith("cps_hf.")}
    libraries = {name.split(".")[0] for name in names} & HEAVY
    return ours, libraries


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    room = room_of(path)
    ours, libraries = imports_of(path)
    if room != "__init__":
        assert "trainer" not in ours - {room}, "nothing imports the trainer"
    if room in ALLOWED:
        allowed_rooms, allowed_libraries = ALLOWED[room]
        assert ours - {room} <= allowed_rooms and libraries <= allowed_libraries


@pytest.mark.parametrize("path", sorted((ROOT / "examples").rglob("*.py")), ids=lambda p: p.name)
def test_examples_use_no_private_name(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cps_hf"):
            assert not any(alias.name.startswith("_") for alias in node.names)


def test_code_that_travels_with_a_branch_never_imports_this_package():
    for path in PACKAGE.glob("modeling/*_deeplabv3_plus.py"):
        ours, _ = imports_of(path)
        assert ours <= {"modeling"}
        assert "cps_hf" not in {
            n.module for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom)
        }


def test_every_objective_of_the_command_line_is_one_file_and_has_a_test():
    from cps_hf.objectives import OBJECTIVES

    for cls in OBJECTIVES.values():
        module = cls.__module__.rsplit(".", 1)[1]
        assert (PACKAGE / "objectives" / f"{module}.py").is_file()
        assert (ROOT / "tests" / "objectives" / f"test_{module}.py").is_file(), module
