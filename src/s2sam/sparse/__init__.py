"""Sparse training: masks, budgets and the methods that choose and move them. Imports torch and numpy only."""
