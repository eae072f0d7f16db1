"""What the scripts in the folder `recipes/` of the repository share."""
