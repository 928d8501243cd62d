"""Convert labels from annotation tools to masks of class ids, and masks back to outlines that tools can edit."""

from .convert import convert, format_report
from .drafts import FORMATS, Draft, write_drafts
from .readers import READERS, read_project

__all__ = ["FORMATS", "READERS", "Draft", "convert", "format_report", "read_project", "write_drafts"]
