"""Where arrays live: the device mesh, and the rules from the models' logical axis names to its axes."""
