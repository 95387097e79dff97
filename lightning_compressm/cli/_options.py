"""The options of every command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lightning_compressm.__about__ import __version__
from lightning_compressm.cli.commands import Picture

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

__all__ = ["make_parser"]

_CHECKPOINT = (
    "file or folder: a checkpoint of Lightning or torch.save, .safetensors, a folder of "
    "transformers or of torch.distributed.checkpoint"
)
_MODEL = "import path package.module:name of the model, or of a function that makes it"


def make_parser() -> ArgumentParser:
    """The parser.

    Raises:
        ImportError: without jsonargparse (the ``cli`` extra).
    """
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog="compressm",
        version=__version__,
        description="Look at checkpoints of state-space models, compress and plot them.",
    )
    commands = parser.add_subcommands(dest="command", metavar="COMMAND")
    commands.add_subcommand("inspect", _inspect(), help="layers, states, spectra and history")
    commands.add_subcommand("compress", _compress(), help="remove states from a checkpoint")
    commands.add_subcommand("plot", _plot(), help="draw spectra, or states over training")
    return parser


def _parser(description: str) -> ArgumentParser:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(description=description)
    parser.add_argument("checkpoint", type=Path, help=_CHECKPOINT)
    return parser


def _inspect() -> ArgumentParser:
    parser = _parser(
        "Show the SSM layers of a checkpoint, their states, what a tolerance would leave of them, "
        "and what was removed in training. Without a model, layers are recognised by their tensors."
    )
    parser.add_argument("--model", type=str | None, help=_MODEL)
    parser.add_argument(
        "--tolerance", dest="tolerances", type=float, nargs="+", default=[0.01, 0.05, 0.1],
        help="shares of the Hankel energy that may go, in [0, 1)",
    )  # fmt: skip
    _add_json(parser)
    return parser


def _compress() -> ArgumentParser:
    parser = _parser(
        "Remove states from the SSM layers of a finished checkpoint and save the weights that are "
        "left, with what a Lightning class needs to load them. load_compressed(model, out) reads "
        "the result."
    )
    add = parser.add_argument
    add("out", type=Path, help="file to write: by safetensors if it is named so, else torch.save")
    add("--model", type=str, required=True, help=_MODEL)
    add(
        "--sample", type=str | None,
        help="a batch: file of torch.save, or import path; selective layers need one",
    )  # fmt: skip
    add("--tolerance", type=float | None, help="share of the Hankel energy that may go (0.05)")
    add("--fraction", type=float | None, help="instead, share of the states to drop")
    add("--state-dim", type=int | None, help="instead, the dimension to go down to")
    add("--min-state-dim", type=int, default=1, help="never go below")
    add("--round-to", type=int, default=1, help="round the kept dimension up to a multiple")
    add("--layers", type=str, nargs="+", help="glob patterns of layers to reduce (all)")
    add("--ignore", type=str, nargs="+", help="glob patterns of layers to leave alone")
    _add_json(parser)
    return parser


def _plot() -> ArgumentParser:
    parser = _parser(
        "Draw the Hankel singular values of a checkpoint's layers, or what became of their states."
    )
    parser.add_argument("out", type=Path, help="picture: .png, .svg or .pdf")
    parser.add_argument(
        "--picture", type=Picture, default="spectra",
        help="what to draw; state-dims and before-after show what was removed in training",
    )  # fmt: skip
    parser.add_argument("--model", type=str | None, help=_MODEL)
    return parser


def _add_json(parser: ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
