"""From a checked request to text: admission, the token stream, stop strings."""
