"""Training: a checked config, the step, and the loop around it."""
