"""Matrices as linear algebra has them, in the precision that they come in."""

import torch


def truncation(update, rank):
    """The best approximation of a matrix, or of a filter as a matrix, at this rank (Eckart and Young, 1936)."""
    u, s, vh = torch.linalg.svd(update.flatten(1), full_matrices=False)
    return ((u[:, :rank] * s[:rank]) @ vh[:rank]).view_as(update)
