"""The command `s2sam`: one file a verb, see `main.py`."""
