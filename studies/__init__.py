"""Studies: measurements whose numbers are committed; every page and picture of them is derived from that JSON."""
