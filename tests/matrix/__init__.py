"""Every transform × recipe × model family, from the registries, through every stage."""
