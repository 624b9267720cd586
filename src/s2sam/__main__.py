"""`python -m s2sam` is the command `s2sam`."""

import sys

from s2sam.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
