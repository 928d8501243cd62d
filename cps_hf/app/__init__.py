"""The page on which branches are tried, and the Space of the Hub that serves it."""
