"""The finetuning jobs that are bound to this agent, from lease to result."""
