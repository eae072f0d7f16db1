"""The speed benchmark: models of realistic cost, the methods that are compared, and forwards counted and timed."""
