"""Several workers of one trial."""
