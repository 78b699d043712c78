"""Noise schedules, parameterisations, step lists, guidance and ODE solvers: mathematics only, no networks."""
