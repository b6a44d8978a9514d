"""One run from its configuration."""
