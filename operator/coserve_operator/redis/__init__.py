"""The operator's side of Redis."""
