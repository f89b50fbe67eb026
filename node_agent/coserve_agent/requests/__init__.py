"""What a client may ask for: parameters and prompts, checked."""
