"""Labels out of annotation tools as masks of class ids, and masks back into tools as outlines to correct."""

from .convert import convert, format_report
from .drafts import FORMATS, Draft, write_drafts
from .readers import READERS, read_project

__all__ = ["FORMATS", "READERS", "Draft", "convert", "format_report", "read_project", "write_drafts"]
