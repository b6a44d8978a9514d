"""Adapters in PEFT's format: saving, loading, swapping, squeezing, inspecting and merging."""
