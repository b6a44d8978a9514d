"""Changing ranks: the layers, their and their optimizers' state."""
