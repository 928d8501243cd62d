"""Imports between subpackages follow the rules: the syntax trees show who imports whom."""

import ast
import importlib
import re
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "cps_hf"
HEAVY = {
    *("transformers", "accelerate", "datasets", "evaluate", "huggingface_hub", "torchvision", "timm", "PIL"),
    *("matplotlib", "jinja2", "yaml", "gradio", "onnx", "onnxruntime"),
}

# Every subpackage, from the bottom up: the subpackages and the libraries it may import, in addition to torch, numpy,
# safetensors, tqdm and the standard library.
IMPORTS = {
    "functional": (set(), set()),
    "files": (set(), set()),
    "config": (set(), set()),
    "visualization": ({"functional", "files"}, {"PIL", "matplotlib"}),
    "metrics": ({"functional"}, {"evaluate", "datasets"}),
    "objectives": ({"functional"}, set()),
    "modeling": ({"functional"}, {"transformers", "timm", "huggingface_hub"}),
    "data": (
        {"config", "functional", "files", "visualization"},
        {"datasets", "torchvision", "PIL", "huggingface_hub"},
    ),
    "annotations": ({"functional", "files", "visualization", "data"}, {"PIL", "yaml"}),
    "scenes": ({"functional", "files", "data"}, {"PIL", "huggingface_hub"}),
    "inference": ({"functional", "files", "modeling"}, {"transformers", "huggingface_hub", "onnx", "onnxruntime"}),
    "planning": (
        {"config", "functional", "data", "objectives", "modeling"},
        {"datasets", "huggingface_hub", "transformers"},
    ),
    "checkpointing": ({"files", "config", "data"}, {"accelerate", "datasets", "transformers"}),
    "hub": ({"files", "config", "metrics", "checkpointing"}, {"huggingface_hub", "jinja2", "transformers"}),
    "report": ({"files", "hub", "visualization"}, {"jinja2", "yaml"}),
    "app": (
        {"functional", "files", "data", "scenes", "inference", "visualization"},
        {"PIL", "gradio", "yaml"},
    ),
    "training": (
        {
            *("functional", "files", "config", "visualization", "metrics", "objectives", "modeling", "data", "scenes"),
            *("inference", "checkpointing", "hub", "report"),
        },
        {"accelerate", "datasets", "transformers", "PIL", "yaml"},
    ),
    "commands": (
        {
            *("functional", "files", "config", "visualization", "metrics", "objectives", "modeling", "data", "scenes"),
            *("inference", "checkpointing", "hub", "report", "app", "training", "planning", "annotations"),
        },
        HEAVY,
    ),
    "__init__": ({"config", "objectives", "training"}, set()),
    "__main__": ({"commands"}, set()),
}
PAGE = ROOT / "docs" / "architecture.md"
MODULES = sorted(PACKAGE.rglob("*.py"))
FOLDERS = [ROOT / name for name in ("docs", "benchmarks", "examples")]
PAGES = sorted(
    [ROOT / "README.md"]
    + [path for folder in FOLDERS for kind in ("*.md", "*.py", "*.yaml") for path in folder.rglob(kind)]
)


def subpackage_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def name_of(path: Path) -> str:
    return ".".join(["cps_hf", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")


KNOWN = {name_of(path) for path in MODULES}


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imported_names(path: Path) -> list[str]:
    """The dotted names that a file imports, anywhere in it; relative imports are made absolute."""
    package = ["cps_hf", *path.relative_to(PACKAGE).parts[:-1]] if path.is_relative_to(PACKAGE) else []
    names = []
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names += [f"{module}.{alias.name}" for alias in node.names]
    return names


def modules_imported_by(path: Path) -> set[str]:
    """The modules of the package that an import of this one names, without the subpackages around them."""
    found = {name if name in KNOWN else name.rsplit(".", 1)[0] for name in imported_names(path)}
    return {name for name in found if name in KNOWN and name != name_of(path)}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_follow_the_rules(path):
    subpackage, names = subpackage_of(path), imported_names(path)
    assert subpackage in IMPORTS, f"{subpackage} is a new subpackage: add to IMPORTS what it may import"
    ours = {name.split(".")[1] for name in names if name.startswith("cps_hf.")} - {subpackage}
    libraries = {name.split(".")[0] for name in names} & HEAVY
    allowed, allowed_libraries = IMPORTS[subpackage]
    assert ours <= allowed, f"{subpackage} imports {ours - allowed}"
    assert libraries <= allowed_libraries, f"{subpackage} imports {libraries - allowed_libraries}"


def test_there_are_no_import_cycles():
    TopologicalSorter({name_of(path): modules_imported_by(path) for path in MODULES}).prepare()  # CycleError


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_commands_import_the_trainer(path):
    if (
        subpackage_of(path) not in ("commands", "__init__", "__main__")
        and path != PACKAGE / "training" / "__init__.py"
    ):
        assert not any(name.startswith("cps_hf.training.trainer") for name in imported_names(path))
        assert not names_the_trainer(tree_of(path))


def names_the_trainer(tree: ast.Module) -> bool:
    """Whether a file uses the class through the package or a subpackage, which re-export it."""
    return any(
        (isinstance(node, ast.alias) and node.name == "CPSTrainer")
        or (isinstance(node, ast.Attribute) and node.attr == "CPSTrainer")
        for node in ast.walk(tree)
    )


@pytest.mark.parametrize(
    "code",
    [
        "from . import CPSTrainer",
        "from .. import CPSTrainer as Trainer",
        "from ..training import RunState, CPSTrainer",
        "import cps_hf\ntrainer = cps_hf.CPSTrainer",
        "from cps_hf import training\ndef f(x: training.CPSTrainer): pass",
    ],
)
def test_every_way_to_import_the_trainer_is_detected(code):
    assert names_the_trainer(ast.parse(code))
    assert not names_the_trainer(ast.parse(code.replace("CPSTrainer", "CPSConfig")))


def test_the_top_level_has_few_modules():
    assert len([*PACKAGE.glob("*.py")]) <= 8


@pytest.mark.parametrize("folder", sorted({path.parent for path in MODULES} - {PACKAGE}), ids=lambda p: p.name)
def test_a_subpackage_has_a_one_sentence_docstring_and_valid_exports(folder):
    subpackage = importlib.import_module(name_of(folder / "__init__.py"))
    first, *_ = subpackage.__doc__.split("\n\n")
    assert re.fullmatch(r"[A-Z`](?:[^.]|\.\w)+\.", first), f"no single sentence: {first}"
    assert subpackage.__all__ and sorted(set(subpackage.__all__)) == sorted(subpackage.__all__)
    assert [name for name in subpackage.__all__ if not hasattr(subpackage, name)] == []


def rows_of_the_page() -> dict[str, tuple[set[str], set[str]]]:
    """By subpackage, the subpackages and libraries that docs/architecture.md says it may import."""
    found = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if named := re.match(r"\| `(\w+)(?:/|\.py)` \|", line):
            *_, subpackages, libraries, _ = (cell.strip() for cell in line.split("|"))
            words = [
                {word for word in cell.split(", ") if word not in ("", "none")} for cell in (subpackages, libraries)
            ]
            found[named[1]] = tuple(words)
    return found


def test_the_page_lists_the_import_rules():
    rules = {subpackage: allowed for subpackage, allowed in IMPORTS.items() if not subpackage.startswith("__")}
    page = rows_of_the_page()
    assert list(page) == list(rules)
    for subpackage, (subpackages, libraries) in rules.items():
        everything = {name for name in rules if name != subpackage}
        assert page[subpackage][0] == ({"all"} if subpackages == everything else subpackages), (
            f"{subpackage}: {', '.join(sorted(subpackages))}"
        )
        assert page[subpackage][1] == ({"any"} if libraries == HEAVY else libraries), (
            f"{subpackage}: {sorted(libraries)}"
        )


def test_the_pages_diagram_shows_the_rules_without_implied_arrows():
    rules = {
        subpackage: set(subpackages)
        for subpackage, (subpackages, _) in IMPORTS.items()
        if not subpackage.startswith("__")
    }
    below: dict[str, set[str]] = {}
    for subpackage in TopologicalSorter(rules).static_order():
        below[subpackage] = rules[subpackage].union(*(below[other] for other in rules[subpackage]))
    needed = {
        (a, b) for a, subpackages in rules.items() for b in subpackages if not any(b in below[c] for c in subpackages)
    }
    drawn = re.search(r"```mermaid\nflowchart TD\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[1]
    lines = [line.split(" --> ") for line in drawn.strip().splitlines()]
    arrows = [(a.strip(), b) for a, others in lines for b in others.split(" & ")]
    assert sorted(arrows) == sorted(needed)


@pytest.mark.parametrize("path", sorted((ROOT / "examples").rglob("*.py")), ids=lambda p: p.name)
def test_examples_use_no_private_names(path):
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cps_hf"):
            assert not any(alias.name.startswith("_") for alias in node.names)


def test_code_copied_with_a_branch_only_imports_its_own_files():
    shared = [PACKAGE / "modeling" / f"{name}.py" for name in ("segmentation_model", "timm_features")]
    own = [path for name in ("deeplabv3_plus", "hrnet", "vit_dpt") for path in PACKAGE.glob(f"modeling/*_{name}.py")]
    assert len(own) == 6
    for path in [*shared, *own]:
        ours = {name for name in imported_names(path) if name.startswith("cps_hf")}
        assert all(name.split(".")[1] == "modeling" for name in ours)
        assert "cps_hf" not in {n.module for n in ast.walk(tree_of(path)) if isinstance(n, ast.ImportFrom)}


def test_every_objective_has_its_own_file_and_test():
    from cps_hf.objectives import OBJECTIVES

    for cls in OBJECTIVES.values():
        module = cls.__module__.rsplit(".", 1)[1]
        assert (PACKAGE / "objectives" / f"{module}.py").is_file()
        assert (ROOT / "tests" / "objectives" / f"test_{module}.py").is_file(), module


@pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_named_in_pages_and_scripts_exist(path):
    named = re.findall(
        r"\b((?:tests|cps_hf|benchmarks|examples|docs)/[\w/.-]+\.\w+)", path.read_text(encoding="utf-8")
    )
    assert [name for name in named if not (ROOT / name).is_file()] == []
