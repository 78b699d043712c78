"""Training objectives: pure functions from parameters and a batch to a loss, each with its equation in the paper."""
