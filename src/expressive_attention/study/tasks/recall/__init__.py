"""Tasks that ask for earlier tokens."""
