"""The engine's process as the event loop sees it: commands in, events out."""
