"""What a search is held to beside its trials: what it may use, what a person asks of it, what is done with its best."""
