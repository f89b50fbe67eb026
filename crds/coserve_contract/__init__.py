"""What operator, agents and feeders say to each other through Redis: keys, messages, shards, scripts, users."""
