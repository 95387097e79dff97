"""`python -m benchmarks.mnist`."""

import sys

from benchmarks.mnist.command import main

if __name__ == "__main__":
    sys.exit(main())
