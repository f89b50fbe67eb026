"""What was decided, carried out at the API server: objects, statuses, events."""
