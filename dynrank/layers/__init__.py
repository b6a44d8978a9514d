"""LoRA layers and how they get into a model."""
