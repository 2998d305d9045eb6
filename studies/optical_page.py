def derive(study):
    return {}
