"""What the API server shows: events into a cache of objects, and what is read in them."""
