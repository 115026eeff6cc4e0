"""`python -m laai_core`."""

import sys

from laai_core.cli import main

if __name__ == "__main__":
    sys.exit(main())
