"""`cps-hf` and its sub-commands: the only room that parses arguments."""
