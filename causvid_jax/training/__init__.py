"""Training: one loop for all stages, their states, optimisers, random streams and checkpoints."""
