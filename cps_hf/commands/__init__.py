"""The `cps-hf` commands, one module per command, and the code that reads command lines and settings files."""

from .main import COMMANDS

__all__ = ["COMMANDS"]
