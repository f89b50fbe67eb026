"""Requests at a rate that does not wait for answers, and what their clients see."""
