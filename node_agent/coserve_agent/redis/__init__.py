"""What an agent says to Redis, and hears from it, beside its jobs."""
