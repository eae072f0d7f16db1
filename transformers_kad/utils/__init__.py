"""Files, names of models, JSON and dictionaries: what several packages need and nothing of KAD."""
