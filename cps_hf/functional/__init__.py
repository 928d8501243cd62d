"""The math on tensors: losses, CutMix, logits at a coarser stride. It imports torch alone."""
