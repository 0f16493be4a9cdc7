"""A first recipe, from what lies in the folders of a base and its experts."""
