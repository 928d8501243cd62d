"""`cps-hf` and its commands, a module each: the room that reads command lines and settings files."""

from .main import COMMANDS

__all__ = ["COMMANDS"]
