"""Train what a YAML file describes: `python -m benchmarks.train fit --config FILE`.

The files are in benchmarks/configs, with benchmarks/README.md about them. Any value can be changed
on the command line, as LightningCLI does it: `--trainer.max_steps 100`.
"""

from __future__ import annotations

from collections.abc import Sequence

import lightning as L
import torch
from lightning.pytorch.cli import LightningCLI


def main(arguments: Sequence[str] | None = None, *, run: bool = True) -> LightningCLI:
    """Parse the arguments and run the subcommand: fit, validate, test or predict.

    Args:
        arguments: Those of the command line, if None.
        run: Build trainer, model and data only; then there is no subcommand.

    Returns:
        The command line interface, with `.trainer`, `.model` and `.datamodule`.

    Example:
        >>> from benchmarks.train.configurations import FOLDER
        >>> cli = main(["--config", str(FOLDER / "cpu/smnist_tau0.02.yaml")], run=False)
        >>> type(cli.datamodule).__name__
        'DigitsDataModule'
    """
    return LightningCLI(
        L.LightningModule,
        L.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        # A second run may use the folder of the first.
        save_config_kwargs={"overwrite": True},
        parser_kwargs={"prog": "python -m benchmarks.train"},
        args=None if arguments is None else list(arguments),
        run=run,
    )


def run_as_program() -> None:
    """Run `main` with the command line's arguments, and leave the other processes in order."""
    main()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # Left alive, gloo's threads can abort the interpreter while it exits.
        torch.distributed.destroy_process_group()
