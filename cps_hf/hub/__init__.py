"""Publishes one branch: the export, its model card, and pushes to the Hub."""

from .card import render_card
from .export import export_branch
from .push import push_branch

__all__ = ["export_branch", "push_branch", "render_card"]
