"""What a model's folder says beside its weights, read without torch."""
