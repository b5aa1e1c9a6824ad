"""What a person asks of a search that runs, or of a study that does not."""
