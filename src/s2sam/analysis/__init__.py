"""Measurements on trained or untrained networks."""
