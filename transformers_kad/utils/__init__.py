"""Small functions on files, names and JSON that several packages need."""
