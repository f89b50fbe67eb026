"""Finetuning jobs: their streams of commands, optimizer steps and checkpoints."""
