"""How a trial is run: the same `fit`, in a Ray Tune process of its own or on workers that one starts."""
