"""The page on which branches are tried, and the Space of the Hub that serves it.

Gradio is an extra, and imported when the page is served.
"""

from .page import Page, Segmented, find_branches
from .serve import serve
from .space import write_space, write_space_of

__all__ = ["Page", "Segmented", "find_branches", "serve", "write_space", "write_space_of"]
