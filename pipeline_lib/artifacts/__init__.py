"""The only code that writes results: publish, verify, lock, digest, provenance."""
