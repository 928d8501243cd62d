"""What reacts to a run and could be left out: pictures, pushes to the Hub, the warning of collapse, the model card."""
