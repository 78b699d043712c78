"""Sampling: the teacher's ODE over whole clips, and chunks of a causal model in a scan or a stream."""
