"""Arithmetic on tensors, one room for each way to do it."""
