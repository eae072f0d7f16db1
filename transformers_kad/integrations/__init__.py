"""KAD in other programs, and the loading of models by name that these and the recipes share."""
