"""One file a recipe: how the weights are obtained."""
