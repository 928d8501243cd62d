"""Drawn street and object scenes with exact labels, for trying the package without data."""

from .object_scenes import draw_object_scene
from .street_scenes import STREET_SIZE, draw_street_scene
from .write import is_drawn, write_object_scenes, write_street_scenes

__all__ = [
    "STREET_SIZE",
    "draw_object_scene",
    "draw_street_scene",
    "is_drawn",
    "write_object_scenes",
    "write_street_scenes",
]
