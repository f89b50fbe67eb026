"""Requests: who gets a place, and what the logits of an iteration become."""
