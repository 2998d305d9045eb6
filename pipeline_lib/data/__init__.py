"""Sources, splits, tokenizers, packing."""
