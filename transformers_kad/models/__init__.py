"""Models that follow growing texts, with caches that can be rolled back."""
