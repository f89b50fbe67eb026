"""The node agent: OpenAI-compatible HTTP, the finetuning worker and the feeder around one engine."""
