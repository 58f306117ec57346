"""Floor 2: what crosses ranks."""
