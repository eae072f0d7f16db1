"""Speed, acceptance and deferral of decoding runs, as an `evaluate` module."""
