"""A Flower app of one's own that becomes split training."""
