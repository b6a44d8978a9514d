"""Several runs of one configuration, and what they came to."""
