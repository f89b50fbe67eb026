"""Arithmetic on tensors: the words that a model is computed in, and one room for each table of them."""
