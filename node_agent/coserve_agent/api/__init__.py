"""What clients talk to: the APIs together, on the HTTP port."""
