"""What the speed benchmark is made of: models of realistic cost, methods side by side, forwards counted and timed."""
