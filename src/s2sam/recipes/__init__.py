"""Whole-run configurations: one YAML file each, whose first line describes it; keys left out have their defaults."""
