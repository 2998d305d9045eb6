"""Methods whose effect is known: a comparison that does not find them cannot be trusted with the others."""
