"""Answer accuracy with a 95 % interval, as an `evaluate` module."""
