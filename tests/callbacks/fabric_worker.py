"""One of two processes that train by Fabric: `OUT`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy

from ..test_loops import through_fabric

if __name__ == "__main__":
    torch.set_num_threads(1)
    fabric = Fabric(
        accelerator="cpu", strategy=DDPStrategy(process_group_backend="gloo"), devices=2
    )
    fabric.launch()
    through_fabric(fabric, Path(sys.argv[1]) / f"{os.environ['LOCAL_RANK']}.pt")
    torch.distributed.destroy_process_group()
