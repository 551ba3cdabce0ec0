"""What runs, in which order: recipes, flows, the command line."""
