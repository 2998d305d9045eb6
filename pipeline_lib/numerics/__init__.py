"""Pure functions on tensors that two transforms or more share."""
