"""Typed settings, the resolver and fingerprints. Imports no torch."""
