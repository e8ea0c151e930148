"""Tasks that ask for what was read before."""
