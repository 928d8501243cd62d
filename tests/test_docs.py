"""The documentation says what the code does: commands parse, snippets run, messages and links exist."""

import ast
import dataclasses
import functools
import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.by_hand import TinyBranch, batches
from support.toy import run_python

from cps_hf.commands import compare, train
from cps_hf.commands.completion import options_of
from cps_hf.commands.main import COMMANDS
from cps_hf.objectives import OBJECTIVES, Objective

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted({*ROOT.glob("*.md"), *DOCS.rglob("*.md")} - {ROOT / "model_card_template.md"})
OTHERS_OPTIONS = {"cpu", "multi_gpu", "num_machines", "shm-size", "ipc", "signal", "include", "local-dir", "output"}
"""Options of accelerate, docker, sbatch, hf and labelme that the pages mention."""


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


# ------------------------------------------------------------------------------------------------ commands


def commands(page: Path) -> list[list[str]]:
    """The arguments of `cps-hf` in bash blocks, as a command or with a launcher; "..." stands for more words."""
    found = []
    for line in "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines():
        words = [word for word in shlex.split(line, comments=True) if word != "..."]
        for start in (["cps-hf"], ["-m", "cps_hf"], ["examples/train_cps.py"]):
            at = next((i for i in range(len(words)) if words[i : i + len(start)] == start), None)
            if at is not None:
                found.append([*(["train"] if start[0].startswith("examples") else []), *words[at + len(start) :]])
                break
    return found


COMMAND_LINES = [(page, words) for page in PAGES for words in commands(page)]


def parse(words: list[str]) -> None:
    command, *rest = words
    if command == "train":
        train.parse(rest)
    elif command == "compare":
        train.parse(rest, compare.ComparisonSettings, command="compare")
    else:
        importlib.import_module(f"cps_hf.commands.{command}").make_parser().parse_args(rest)


COMMAND_IDS = [f"{name_of(page)}: {' '.join(words)}" for page, words in COMMAND_LINES]


@pytest.mark.parametrize(("page", "words"), COMMAND_LINES, ids=COMMAND_IDS)
def test_a_command_of_a_page_parses(page, words, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    try:
        parse(words)
    except SystemExit as ended:
        assert not ended.code, capsys.readouterr().err


def test_commands_with_a_wrong_option_do_not_parse(capsys):
    with pytest.raises(SystemExit):
        parse(["train", "DIR", "--max_step", "3"])
    assert len(COMMAND_LINES) > 40


@functools.cache
def known_options() -> set[str]:
    ours = {option.lstrip("-") for command in COMMANDS for option in options_of(command)}
    return ours | OTHERS_OPTIONS | {"help", "help-all", "version"}


@pytest.mark.parametrize("page", [p for p in PAGES if p.is_relative_to(DOCS)], ids=name_of)
def test_options_named_in_the_text_exist(page):
    launched = {name for block in blocks(page, "bash") for name in re.findall(r"--([\w-]+)", block)}
    named = re.findall(r"(?<![\w-])--([a-z][\w-]*)", " ".join(re.findall(r"`([^`\n]+)`", prose(page))))
    assert [name for name in named if name not in known_options() | launched] == []


# ------------------------------------------------------------------------------------------------ Python

SNIPPETS = [(page, block) for page in PAGES for block in blocks(page, "python")]


@pytest.mark.parametrize(("page", "block"), SNIPPETS, ids=[f"{name_of(p)}-{i}" for i, (p, _) in enumerate(SNIPPETS)])
def test_imports_of_snippets_exist(page, block):
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []
        elif isinstance(node, ast.Import):
            for alias in node.names:
                pytest.importorskip(alias.name, reason=f"{alias.name} is not installed")


def run_page(name: str) -> dict:
    """The names that a page's snippets define."""
    found = {"__name__": "page"}
    for block in blocks(DOCS / name, "python"):
        exec(compile(block, name, "exec"), found)
    return found


def test_the_example_method_works(monkeypatch):
    found = run_page("adding_a_method.md")  # the last snippet is itself a test
    branches = [TinyBranch(0), TinyBranch(1)]
    output = found["EntropyMinimization"]()(branches, *batches())
    output.loss.backward()
    assert torch.isfinite(output.loss) and {*output.logs} == {"supervised_loss", "entropy_loss"}


def test_the_example_data_set_loads(tmp_path):
    for name in ("a", "b", "c"):
        Image.new("RGB", (6, 4)).save(tmp_path / f"{name}.jpg")
        Image.new("L", (6, 4), 2).save(tmp_path / f"{name}_mask.png")
    found = run_page("adding_a_dataset.md")
    dataset = found["load_pairs"](tmp_path)
    labeled, unlabeled = found["split"](dataset, labeled=1)
    assert len(dataset) == 3 and len(labeled) == 1 and len(unlabeled) == 2
    assert dataset[0]["label"].getpixel((0, 0)) == 2 and unlabeled.column_names == ["image", "id"]
    assert found["colours"].id2label == {0: "road", 1: "sky"} and found["grey"].values[254] == 255


# ------------------------------------------------------------------------------------------------ methods


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_methods_page_has_all_hyper_parameters(name):
    page = (DOCS / "objectives" / f"{name}.md").read_text(encoding="utf-8")
    shared = {field.name for field in dataclasses.fields(Objective)}
    defaults = {f.name: getattr(OBJECTIVES[name](), f.name) for f in dataclasses.fields(OBJECTIVES[name])}
    assert [field for field in defaults if field not in shared and f"`{field}`" not in page] == []
    for names, shown in re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| ([^|]*) \|", page, re.MULTILINE):
        for field in re.findall(r"`(\w+)`", names):
            value = shown.strip().strip("`")
            if re.fullmatch(r"[\d.]+|true|false", value):
                value = ast.literal_eval(value.capitalize())
            elif not isinstance(defaults[field], str):
                continue  # in words
            assert defaults[field] == value, field


def test_the_overview_lists_every_method():
    page = (DOCS / "objectives" / "index.md").read_text(encoding="utf-8")
    assert [name for name in OBJECTIVES if f"[`{name}`]({name}.md)" not in page] == []


# ------------------------------------------------------------------------------------------------ messages and links


def texts() -> str:
    """All text of the package's source, with "…" for placeholders; one line per string."""

    def text(node: ast.AST) -> str:
        if isinstance(node, ast.Constant):
            return node.value if isinstance(node.value, str) else ""
        return "".join(value.value if isinstance(value, ast.Constant) else "…" for value in node.values)

    found = []
    for path in (ROOT / "cps_hf").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str)):
                found.append(re.sub(r"%[.\d]*[sdgfr]", "…", text(node)))
    return "\n".join(found)


def test_troubleshooting_headings_are_messages_of_the_code():
    headings = re.findall(r"^### `(.*)`$", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE)
    source = texts()
    assert len(headings) > 20 and [heading for heading in headings if heading not in source] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_lead_to_files(page):
    targets = re.findall(r"\]\(<?((?!\w+:|#)[^)#>\s]+)", prose(page))
    if page.name == "model_card_example.md":  # its links are valid in a branch's folder
        targets = []
    assert [target for target in targets if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", [*PAGES, ROOT / "benchmarks" / "README.md"], ids=name_of)
def test_no_line_begins_with_a_percent_sign(page):
    """MyST takes such a line for a comment, and the site loses it."""
    assert re.findall(r"^\s*%.*", prose(page), re.MULTILINE) == []


def test_licences_cover_every_named_model():
    sources = [ROOT / "README.md", *(ROOT / "examples").rglob("*.*"), *(ROOT / "cps_hf" / "planning").glob("*.py")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in sources if path.suffix != ".pyc")
    named = set(re.findall(r"\b(?:timm|nvidia|facebook|microsoft|openmmlab|google)/[\w.-]*\w", text))
    told = (DOCS / "licences.md").read_text(encoding="utf-8")
    assert len(named) > 6 and [name for name in named if name not in told] == []


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_needs_no_network(tmp_path):
    for name in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(name, reason=f'{name} is missing: pip install "cps_hf[docs]"')
    options = ["-W", "--keep-going", "-q", "-d", str(tmp_path / "read")]
    done = run_python("-m", "sphinx", *options, str(DOCS), str(tmp_path / "site"), cwd=ROOT, timeout=590)
    assert done.returncode == 0, done.stderr[-4000:]
    for page in ("index.html", "objectives/cps.html", "api/settings.html", "troubleshooting.html"):
        html = (tmp_path / "site" / page).read_text(encoding="utf-8")
        assert not re.findall(r'<(?:script|img|iframe)[^>]+src="https?:|<link[^>]+href="https?:', html), page
    assert "<math" in (tmp_path / "site" / "objectives" / "cps.html").read_text(encoding="utf-8")
