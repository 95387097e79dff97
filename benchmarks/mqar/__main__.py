"""`python -m benchmarks.mqar`."""

import sys

from benchmarks.mqar.command import main

if __name__ == "__main__":
    sys.exit(main())
