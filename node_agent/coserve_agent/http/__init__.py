"""The OpenAI-compatible API and the admin API."""
