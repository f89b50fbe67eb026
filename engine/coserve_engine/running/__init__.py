"""How a plan is run: on a device that computes at once, or ahead of one that computes behind the host."""
