"""Mean deferral mass D, as an `evaluate` module."""
