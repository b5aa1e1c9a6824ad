"""Trials that go on from the checkpoints of others: population based training."""
