"""A finished run as one HTML page: what was set, what came of it, on which images, and how to load it."""

from .page import render_report, write_report

__all__ = ["render_report", "write_report"]
