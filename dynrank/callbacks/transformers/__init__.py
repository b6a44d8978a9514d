"""The callback for transformers' Trainer, and what it needs from it."""
