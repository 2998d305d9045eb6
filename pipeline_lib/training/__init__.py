"""Three engines and the recipes that hook into them."""
