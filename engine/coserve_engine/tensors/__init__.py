"""Memory that outlives an iteration: keys and values, and what passes keep."""
