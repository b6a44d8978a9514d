"""Several runs of one configuration, and their results."""
