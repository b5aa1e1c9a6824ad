"""The machines of a search: its Ray cluster, what it shares, how a job gets there. Of Ray alone, not of trials."""
