"""Drawn street and object scenes with exact labels, to try the package on without data."""
