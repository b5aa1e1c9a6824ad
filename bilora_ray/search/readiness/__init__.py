"""What can be known before a search is begun: whether all that it needs is there, and what it will take."""
