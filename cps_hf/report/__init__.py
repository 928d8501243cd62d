"""A finished run as one HTML page: what was set, what came of it, on which images, and how to load it."""
