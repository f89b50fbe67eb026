"""OpenAI's API: its routes, and how an answer is written."""
