"""One page a study: what it found, to look at. It reads through `StudyView`, and trains and writes nothing else."""
