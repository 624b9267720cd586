"""Reports of finished runs: statistics over seeds, tables, figures, and one self-contained page."""
