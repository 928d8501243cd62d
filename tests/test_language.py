"""Texts are plain English: a list of phrases stays out, and test names are short."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOTS = [
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "CITATION.cff", "docs", "benchmarks", "examples"),
    *("cps_hf", "tests"),
]
SUFFIXES = {".md", ".py", ".yaml", ".cff", ".ipynb", ".sbatch", ".css"}
RECORDS = ROOT / "benchmarks" / "results"  # output of earlier runs, which is not edited
MAX_TEST_NAME = 70

THINGS = "branch|class|run|process|step|image|tool|file|set|node|line|page|pixel"
NO_CODE = r"(?<!is\x20)(?<!not\x20)(?<!->\x20)"  # "if x is None: a = 1"
PHRASES = {  # pattern: what to write instead
    r"said aloud": "printed, logged, reported",
    r"asked for|\bit asks for": "requested, set, given, needed",
    r"\bhand(s|ed|ing)? out\b": "return, yield",
    rf"\b(one|once|twice|two) an? ({THINGS})\b": "one per branch, once per run",
    rf"\ba ({THINGS})('s)? and micro-batch\b": "per process and micro-batch",
    rf"\ba (line|name|row|colour|batch|launcher) an? ({THINGS}|name)\b": "one line per run",
    rf"{NO_CODE}\bnone: (as|the|that|those|all|own|a|what|no)\b": "If `None`, ...; by default, ...",
    r"\bmend(s|ed|ing)?\b": "fix, repair",
    r"\brefus(e|es|ed|ing|al)\b": "reject, raise, is an error, is not supported",
    r"\b_How\b|\b_ask\b|\b_asked_for\b": "a name that says what it is",
    r"\blaws?\b": "rule",
    r"\b(a|each|every|new|other|the|this|these|those|which) rooms?\b": "subpackage",
    r"\bgoes on\b|\b(go|going|went|gone) on (from|with|where|by itself|again|there)\b": "continue, resume",
    r"\bof (one's|its|their|his) own\b": "own, or nothing",
    r"\bbeside (the|an?|its?|them|each|every|one|others?|that|this|these|those|which)\b": "next to, compared with",
    r"\b(tell|tells|told|telling) \w+ apart\b|\b(tells?|telling) apart\b": "distinguish",
    r"\bin a word\b": "in one name",
    r"\b(typed|written|made|typing|edited) (out )?by hand\b": "manually, independently",
    r"\bwhatever the (number|result|method|batch|user|split)\b": "for any ...",
    r"\bwhere there (is|are) (one|none|some)\b": "if any",
    r"\bas people have (it|them)\b": "any folder",
    r"\bhas a say\b": "affects",
    r"\banew\b": "again",
    r"\bcut short\b": "truncated",
    r"\blook(s|ed|ing)? at what you made\b": "check the result",
    r"\bwill do\b": "works too",
    r"(?<!there\x20)\bis no (image|mask|class|number|file|folder|table|model|terminal|legal)\b": "is not a ...",
    r"\bthe commonest\b": "the most common",
    r"\bmoves? by (half|a|several|tens|-?\d)": "varies by",
}


def files() -> list[Path]:
    found = []
    for root in ROOTS:
        path = ROOT / root
        found += [path] if path.is_file() else sorted(path.rglob("*"))
    return [
        path for path in found if path.suffix in SUFFIXES and RECORDS not in path.parents and path != Path(__file__)
    ]


def phrases_in(text: str) -> list[str]:
    """The `PHRASES` in a text, also across line ends, as "line N: words -> better"."""
    found = []
    for pattern, better in PHRASES.items():
        across = pattern.replace(" ", r"\s+(?:# )?")  # a comment's next line begins with "# "
        for match in re.finditer(across, text, re.IGNORECASE):
            found.append(f"line {text.count(chr(10), 0, match.start()) + 1}: {' '.join(match[0].split())} -> {better}")
    return found


@pytest.mark.parametrize("root", ROOTS)
def test_the_text_is_plain_english(root):
    of_root = [path for path in files() if path.is_relative_to(ROOT / root)]
    assert of_root
    found = [f"{path.relative_to(ROOT)}, {one}" for path in of_root for one in phrases_in(path.read_text("utf-8"))]
    assert found == []


@pytest.mark.parametrize(
    "text",
    [
        "It is said aloud.",
        "A line a run, and one a branch.",
        "none: as many as there are processes",
        "what a user can mend",
        "It Refuses masks.",
        "The run goes\non from there.",
        "# a batch of its\n# own",
        "class _How:",
    ],
)
def test_a_phrase_is_found_across_lines_and_cases(text):
    assert phrases_in(text)
    assert not phrases_in("One line per run. If `None`, the run continues with its own batch, and an error is raised.")
    assert not phrases_in("if x is None: a = 1")


def test_names_of_tests_are_short():
    names = [
        f"{path.relative_to(ROOT)}: {node.name}"
        for path in files()
        if path.name.startswith("test_")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_") and len(node.name) > MAX_TEST_NAME
    ]
    assert names == []
