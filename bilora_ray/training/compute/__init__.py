"""How the passes of a step and of an evaluation are computed: fast, and within the memory that there is."""
