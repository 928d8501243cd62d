"""What of a run is saved, whole or not at all, and how a run goes on from it."""
