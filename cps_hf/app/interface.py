"""The page in Gradio: its layout and event handlers. Nothing is loaded from other servers: no fonts, no
telemetry."""

from __future__ import annotations

import html
import os
from collections.abc import Sequence

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when Gradio is imported

import gradio

from .page import MAX_BYTES, NO_BRANCH, Page

CSS = """
.message { margin: 0; padding: .5em .8em; border-radius: 6px; border: 1px solid var(--border-color-primary); }
.message.error { background: #fde8e8; color: #7f1010; border-color: #cc3311; font-weight: 600; }
.caption { margin: 0 0 -8px; font-weight: 600; }
.classes table { width: 100%; border-collapse: collapse; font-size: 15px; border: 0 !important; }
.classes th, .classes td { text-align: left; padding: 3px 8px; border: 0 !important; white-space: nowrap; }
.classes tr { border: 0; border-bottom: 1px solid var(--border-color-primary); }
.classes td span { display: inline-block; min-width: 4.8em; text-align: right; }
.swatch { display: inline-block; width: 1.1em; height: 1.1em; margin-right: .6em; border: 1px solid #888;
  border-radius: 3px; vertical-align: -0.2em; }
.share { display: inline-block; width: 36%; height: .8em; background: #8882; }
.share i { display: block; height: 100%; }
"""


def build(page: Page, other: str, examples: Sequence[str], title: str) -> gradio.Blocks:
    """The page.

    Args:
        other: the branch to compare with at the start.
        examples: example image files.
    """
    with gradio.Blocks(title=title, analytics_enabled=False) as blocks:
        gradio.Markdown(f"# {title}")
        with gradio.Row():
            with gradio.Column(scale=1, min_width=300):
                gradio.HTML(
                    _caption(f"Image, up to {page.max_pixels / 1e6:g} megapixels and {MAX_BYTES >> 20} MB"),
                    padding=False,
                )
                image = gradio.Image(
                    type="filepath", sources=["upload", "clipboard"], height=260, elem_id="image", show_label=False
                )
                # Gradio would decode the file before its size is checked.
                image.preprocess = lambda payload: None if payload is None else payload.path
                branch = gradio.Dropdown(page.names, value=page.names[0], label="Branch", elem_id="branch")
                beside = gradio.Dropdown([*page.names, NO_BRANCH], value=other, label="Compare with", elem_id="beside")
                # Not gradio.Examples: a click there would replace this Image by one without our `preprocess`.
                picks = gradio.Dataset(
                    components=["image"], samples=[[path] for path in examples], type="index", label="Examples"
                )
                picks.click(lambda index: examples[index], picks, image, show_progress="hidden")
            with gradio.Column(scale=3, min_width=480):
                message = gradio.HTML(page.segment(None, page.names[0], None).message, elem_id="message")
                with gradio.Row():
                    overlay_column, overlay_caption, overlay = _picture("overlay")
                    other_column, other_caption, others = _picture("other")
                with gradio.Row():
                    differing_column, differing_caption, differing = _picture("differing")
                    table = gradio.HTML(elem_id="table", elem_classes="classes")

        def segment(path: str | None, name: str, compared: str):
            found = page.segment(path, name, compared)
            one, both = (gradio.update(visible=shown is not None) for shown in (found.overlay, found.other))
            differs = f"Where {name} and {compared} differ (red)"
            return [
                found.message,
                *(one, _caption(name), found.overlay),
                *(both, _caption(compared), found.other),
                *(both, _caption(differs), found.differing),
                found.table,
            ]

        gradio.on(
            [image.change, branch.change, beside.change],
            segment,
            inputs=[image, branch, beside],
            outputs=[
                message,
                *(overlay_column, overlay_caption, overlay),
                *(other_column, other_caption, others),
                *(differing_column, differing_caption, differing),
                table,
            ],
            show_progress="minimal",
            api_name="segment",
        )
    return blocks


def _picture(name: str) -> tuple[gradio.Column, gradio.HTML, gradio.Image]:
    """A picture below its caption (Gradio's own label would cover it), hidden until there is a picture."""
    with gradio.Column(visible=False, min_width=320) as column:
        caption = gradio.HTML(padding=False)
        picture = gradio.Image(
            interactive=False, show_label=False, elem_id=name, format="png", buttons=["download", "fullscreen"]
        )
    return column, caption, picture


def _caption(text: str) -> str:
    return f'<p class="caption">{html.escape(text)}</p>'


def launch(page: Page, other: str, examples: Sequence[str], title: str, host: str | None, port: int | None) -> None:
    """Serve the page until the process is stopped. `host`, `port`: if None, Gradio's (GRADIO_SERVER_NAME, ...)."""
    # System fonts, which need no network.
    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    build(page, other, examples, title).launch(
        server_name=host,
        server_port=port,
        max_file_size=MAX_BYTES,
        ssr_mode=False,
        share=False,
        show_error=True,
        theme=theme,
        css=CSS,
        footer_links=[],
        allowed_paths=sorted({os.path.dirname(os.path.abspath(path)) for path in examples}),
    )
