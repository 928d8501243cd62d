"""Pictures: class maps in colours, panels of predictions, learning curves, confusion matrices."""
