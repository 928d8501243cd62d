"""A finished run as one HTML page: its settings, its results, example images, and how to load the result."""

from .page import render_report, write_report

__all__ = ["render_report", "write_report"]
