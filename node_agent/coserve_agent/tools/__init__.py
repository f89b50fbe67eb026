"""Calls of tools, and what was thought before them, in the text that a model writes: found, and asked for."""
