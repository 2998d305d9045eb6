"""What imperfect arithmetic does to a model: registry, sites, composition, application; one folder a transform."""
