"""Other programs that KAD runs in, and what they need to load a pair by name."""
