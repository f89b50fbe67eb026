"""Decisions: pure functions and books of ints, floats and ids, without a tensor."""
