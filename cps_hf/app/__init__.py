"""The page for trying branches, and the Hugging Face Space that serves it.

Gradio is an optional dependency, imported when the page is served.
"""

from .page import Page, Segmented, find_branches
from .serve import serve
from .space import write_space, write_space_of

__all__ = ["Page", "Segmented", "find_branches", "serve", "write_space", "write_space_of"]
