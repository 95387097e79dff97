"""What a process of a comparison does before it works. Imports little: it is imported in each."""

from __future__ import annotations

import multiprocessing
import os
import threading

from benchmarks.common.command import prepare


def start() -> None:
    """In every process, before it works."""
    prepare()
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """Without this, a worker trains on when its parent was killed, for nobody."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
