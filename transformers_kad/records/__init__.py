"""Statistics and trace of a finished call of `generate`."""
