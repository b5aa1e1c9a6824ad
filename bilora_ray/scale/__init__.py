"""One trial on the workers that it was given: the same `fit`, inside a Ray Tune process."""
