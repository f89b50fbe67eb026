"""A command a module: what may be typed, and what is said in the end. What it does lies beside this room."""
