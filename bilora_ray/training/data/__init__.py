"""Where rows come from, which come together, and in which order."""
