"""What a worker process does first of all."""

from __future__ import annotations

import multiprocessing
import os
import threading


def start() -> None:
    """In every process, before it imports what it works with."""
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """Without this, a worker trains on when its parent was killed, for nobody."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
