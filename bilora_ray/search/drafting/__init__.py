"""A space file for a data file, a model and a task, from a look at them: ready to run, and each guess of it told."""
