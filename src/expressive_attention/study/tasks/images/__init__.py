"""Real images that a small vision transformer names, read as a sequence of patches."""
