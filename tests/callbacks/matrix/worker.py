"""Runs cells of the matrix in pairs of processes: `python -m ...matrix.worker OUT KEY...`.

Cells that Lightning starts by running the program again (``ddp``) share one pair. Forked and
spawned pairs belong to a Trainer, so each of those cells gets its own; forks come out of this
process, which never computes anything and so has no threads that they would miss.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

import torch

from lightning_compressm.model.layers import find_ssm_layers

from . import cells
from .run import run

# The launcher sets OMP_NUM_THREADS: torch.set_num_threads would start a pool of threads here, which
# forked processes then find dead.
if any(name.startswith("mamba_ssm") for name in sys.argv):
    # A spawned process imports this file, and then unpickles the model.
    from lightning_compressm.compat import enable_mamba_ssm_cpu

    enable_mamba_ssm_cpu()


def run_here(cell: cells.Cell, out: Path) -> None:
    rank = os.environ.get("LOCAL_RANK", "main")
    try:
        model = run(cell, out, devices=2)
        if cell["strategy"] != "ddp":
            found = {name: layer.state_dim for name, layer in find_ssm_layers(model).items()}
            torch.save({"found": found, "state_dict": model.state_dict()}, out / "main.pt")
    except Exception:
        (out / f"error.{rank}.txt").write_text(traceback.format_exc())


def main(out: Path, keys: list[str]) -> None:
    for cell in (*cells.cells(), *cells.averaged_cells()):
        if cells.key(cell) in keys:
            run_here(cell, out / cells.key(cell))
    if torch.distributed.is_initialized():
        # Left alive, gloo's threads can abort the interpreter while it exits.
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
