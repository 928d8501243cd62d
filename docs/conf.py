"""Build the documentation site: `sphinx-build -W docs build/docs`.

Neither the build nor the reader's browser needs a network.
"""

import dataclasses
import re
import sys
from pathlib import Path

from docutils import nodes
from docutils.utils.math import latex2mathml
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # for a checkout that is not installed

import cps_hf  # noqa: E402

project = "cps_hf"
author = "The cps_hf authors"
copyright = author
release = version = cps_hf.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "README.md"]

# The pages are also read on GitHub: support its links to headings, and its formulas.
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
# GitHub draws these diagrams. Here they are shown as text, since drawing them needs an external script.
myst_fence_as_directive = ["mermaid"]
suppress_warnings = ["myst.header"]  # a model card's headings start at the second level

html_theme = "furo"
html_title = f"cps_hf {release}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_math_renderer = "mathml"  # below
html_theme_options = {"navigation_with_keys": True}

# Docstrings use single backticks for code.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False


def links_beyond(app, docname: str, source: list[str]) -> None:
    """Turn GitHub's links to repository files into downloads, and include benchmarks/README.md as a page."""
    if docname == "measurements":
        text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
        source[0] = re.sub(r"\]\((?!\w+:|#)", "](../benchmarks/", text)
    above = "../" * (docname.count("/") + 1)
    source[0] = source[0].replace(f"]({above}benchmarks/README.md", "](/measurements.md")
    source[0] = re.sub(rf"\]\(({re.escape(above)}[^)#]+\.md)(#[^)]*)?\)", r"](path:\1)", source[0])


def readable(app, what, name, obj, options, lines: list[str]) -> None:
    """Prepare docstrings for napoleon.

    The settings' docstrings list fields under custom headings, which `--help` shows: each heading becomes a rubric,
    and each field gets its default. A property's docstring is a sentence: text before a colon is not a type.
    """
    if what in ("property", "attribute", "data"):
        lines[:1] = [line.replace(": ", " – ", 1) for line in lines[:1]]
    if what != "class" or not name.startswith("cps_hf.config."):
        return
    defaults = {field.name: field for field in dataclasses.fields(obj)}
    found = []
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        named = re.match(r" +(\w+): ", line)
        if re.fullmatch(r"[A-Z][^.:]*", line) and re.match(r" +\w+: ", following):
            found += [f".. rubric:: {line}", "", "Args:"]
        elif named and named[1] in defaults:
            field = defaults[named[1]]
            has_factory = field.default_factory is not dataclasses.MISSING
            default = field.default_factory() if has_factory else field.default
            found.append(line.replace(f"{named[1]}: ", f"{named[1]} ({field.type}, default ``{default!r}``): ", 1))
        else:
            found.append(line)
    lines[:] = found


def without_signature(app, what, name, obj, options, signature, returned) -> tuple[str, None] | None:
    """Omit the signature of settings: their eighty fields are listed with defaults below."""
    return ("", None) if what == "class" and name.startswith("cps_hf.config.") else None


def visit_math(self, node: nodes.math) -> None:
    """Write a formula as MathML, which browsers display natively."""
    self.body.append(latex2mathml.tex2mathml(node.astext(), as_block=False))
    raise nodes.SkipNode


def visit_math_block(self, node: nodes.math_block) -> None:
    """Write a display formula, which scrolls on narrow screens."""
    self.body.append(f'<div class="math">{latex2mathml.tex2mathml(node.astext(), as_block=True)}</div>')
    raise nodes.SkipNode


class Diagram(SphinxDirective):
    """Show a diagram's source as text."""

    has_content = True

    def run(self):
        text = "\n".join(self.content)
        return [nodes.literal_block(text, text, language="text")]


def setup(app) -> None:
    app.add_directive("mermaid", Diagram)
    app.connect("source-read", links_beyond)
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
    app.connect("autodoc-process-signature", without_signature)
    app.connect("autodoc-process-docstring", readable, priority=400)  # before napoleon
