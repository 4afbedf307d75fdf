"""Other engines to compare with; each program runs in that engine's own environment."""
