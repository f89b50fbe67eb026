"""The operator: binds endpoints and finetuning jobs to node agents."""
