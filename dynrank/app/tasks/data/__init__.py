"""Where the shipped tasks take their data from."""
