"""The recipes: typed YAML files, their presets, and the method that is built from them."""
