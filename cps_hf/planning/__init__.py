"""The settings of a run on people's own images, chosen from what their data and their machine are."""
