"""Changing ranks: the layers, their optimizer state, averages, and what is measured before."""
