"""One file a dataset source."""
