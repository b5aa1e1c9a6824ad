"""What a study is held to beside its sampler and its scheduler: what it may use, keep, and call its best."""
