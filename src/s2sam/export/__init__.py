"""What becomes of a trained network: a smaller dense one."""
