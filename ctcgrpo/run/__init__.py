"""A run from a recipe to a checkpoint: the recipe, its assembly, the folder, validation, tracking, export."""
