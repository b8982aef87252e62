"""What a model is made of, whatever its architecture: sizes, layers, ties, per-layer configs."""
