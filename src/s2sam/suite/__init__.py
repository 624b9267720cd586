"""Suites: a whole table of runs from one YAML file, trained, resumed, compared and written by one command."""
