"""``python -m lightning_compressm``: look at checkpoints, compress and plot them."""

import sys

from lightning_compressm.cli import main

if __name__ == "__main__":
    sys.exit(main())
