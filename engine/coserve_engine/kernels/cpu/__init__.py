"""The table of a CPU."""
