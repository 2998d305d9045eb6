"""Model sizes, builders, hub loading, names, export."""
