"""Rules: probabilities in, probabilities out."""
