"""Parameters and bytes of a run by rank, from its configuration only."""
