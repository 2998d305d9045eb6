"""Task families and the runner that evaluates a transformed model."""
