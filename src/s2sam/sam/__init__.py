"""Sharpness-aware minimization with one gradient a step (S2SAM) and with two (SAM). Imports torch and numpy only."""
