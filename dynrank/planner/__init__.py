"""Parameters and bytes by rank, from a configuration alone."""
