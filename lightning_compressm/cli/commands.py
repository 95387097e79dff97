"""What the command line can do; each function is a command, its arguments are the options."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from lightning_compressm.cli._facts import LayerFacts, bare_model, facts_of, history_of
from lightning_compressm.cli._objects import load_model, load_sample
from lightning_compressm.cli._show import show_events, show_json, show_layers
from lightning_compressm.compressor import compress as compress_model
from lightning_compressm.errors import CheckpointError
from lightning_compressm.model.files import Checkpoint, read_checkpoint, safetensors_for
from lightning_compressm.model.loading import load_compressed
from lightning_compressm.plot import plot_before_after, plot_spectra, plot_state_dims

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Picture", "compress", "inspect", "plot"]

Picture = Literal["spectra", "state-dims", "before-after"]

# What a Lightning checkpoint needs to be loaded by its class; the state of training is left out.
_KEPT = ("hyper_parameters", "hparams_name", "hparams_type", "pytorch-lightning_version", "epoch",
         "global_step", "datamodule_hyper_parameters")  # fmt: skip


def inspect(
    checkpoint: Path,
    model: str | None = None,
    tolerances: Sequence[float] = (0.01, 0.05, 0.1),
    json: bool = False,
) -> None:
    """Show the SSM layers of a checkpoint, their states, what a tolerance would leave, and history.

    Without a model, layers are recognised by the names and shapes of their tensors.

    Args:
        checkpoint: file or folder: of Lightning, torch.save, safetensors, transformers, or
            torch.distributed.checkpoint.
        model: import path "package.module:name" of the model, or of what makes it.
        tolerances: shares of the Hankel energy that may go, each in [0, 1).
        json: print JSON instead of tables.
    """
    read, layers = _look(checkpoint, model)
    history = history_of(read)
    if not layers and not history:
        raise _nothing(checkpoint, read, "an SSM layer", model)
    if json:
        known = [layer.to_dict(tolerances) for layer in layers]
        show_json({"file": str(checkpoint), "kind": read.kind, "layers": known, "history": history})
        return
    print(f"{checkpoint}: {read.kind}, {_count(read.state_dict):,} numbers")
    if layers:
        show_layers(layers, tolerances)
    show_events(history)


def compress(
    checkpoint: Path,
    out: Path,
    model: str,
    sample: str | None = None,
    tolerance: float | None = None,
    fraction: float | None = None,
    state_dim: int | None = None,
    min_state_dim: int = 1,
    round_to: int = 1,
    layers: list[str] | None = None,
    ignore: list[str] | None = None,
    json: bool = False,
) -> None:
    """Remove states from the SSM layers of a finished checkpoint, and save what is left.

    The result holds the weights (of a Lightning checkpoint also what its class needs to load it)
    and what was done; `load_compressed(model, out)` reads it.

    Args:
        checkpoint: as for inspect.
        out: file to write, with torch.save, or with safetensors if it is named so.
        model: import path "package.module:name" of the model, or of what makes it.
        sample: a batch, by a file of torch.save or an import path; selective layers need one.
        tolerance: share of each layer's Hankel energy that may go, in [0, 1); 0.05 by default.
        fraction: instead, share of the states to drop.
        state_dim: instead, the dimension to go down to.
        min_state_dim: never go below.
        round_to: round the kept dimension up to a multiple.
        layers: glob patterns of layers to reduce; all by default.
        ignore: glob patterns of layers to leave alone.
        json: print JSON instead of a table.
    """
    if out.exists() and out.resolve() == checkpoint.resolve():
        raise ValueError(f"expected another file to write than the one that is read, got '{out}'")
    read = read_checkpoint(checkpoint)
    module = _loaded(model, read)
    report = compress_model(
        module,
        tolerance,
        fraction=fraction,
        state_dim=state_dim,
        sample=None if sample is None else load_sample(sample),
        min_state_dim=min_state_dim,
        round_to=round_to,
        layers=layers,
        ignore=ignore,
    )
    events = report.to_dict()["events"]
    _save(out, module, read, events)
    before, after = _count(read.state_dict), _count(module.state_dict())
    if json:
        show_json(
            {"file": str(out), "numbers": {"before": before, "after": after}, **report.to_dict()}
        )
        return
    show_events(events)
    print(f"Wrote {out}: {after:,} numbers instead of {before:,}")


def plot(
    checkpoint: Path, out: Path, model: str | None = None, picture: Picture = "spectra"
) -> None:
    """Draw the Hankel singular values of a checkpoint's layers, or what became of their states.

    Args:
        checkpoint: as for inspect.
        out: picture to write; its suffix says the format (.png, .svg, .pdf).
        model: import path "package.module:name" of the model, or of what makes it.
        picture: the spectra; or, of what was removed in training, the state dimensions over steps,
            or those before and after.
    """
    if picture == "spectra":
        figure = _spectra(checkpoint, model)
    else:
        read = read_checkpoint(checkpoint)
        history = history_of(read)
        if not history:
            raise _nothing(checkpoint, read, "a history of CompreSSMCallback or compress", "")
        figure = (plot_state_dims if picture == "state-dims" else plot_before_after)(history)
    figure.savefig(out, dpi=150)
    print(f"Wrote {out}")


def _spectra(checkpoint: Path, model: str | None) -> Figure:
    read, layers = _look(checkpoint, model)
    spectra = {layer.name: layer.spectrum for layer in layers if layer.spectrum is not None}
    if not spectra:
        raise _nothing(checkpoint, read, "a linear SSM layer", model)
    return plot_spectra(spectra)


def _look(checkpoint: Path, model: str | None) -> tuple[Checkpoint, list[LayerFacts]]:
    """A checkpoint, and its layers by their tensors or by the code of their model."""
    read = read_checkpoint(checkpoint)
    module = bare_model(read.state_dict) if model is None else _loaded(model, read)
    return read, facts_of(module, bare=model is None)


def _nothing(checkpoint: Path, read: Checkpoint, wanted: str, model: str | None) -> CheckpointError:
    advice = ". Give --model: some are only known with their code" if model is None else ""
    return CheckpointError(
        f"'{checkpoint}' ({read.kind}, {len(read.state_dict)} tensors): expected {wanted}, found "
        f"none{advice}"
    )


def _loaded(model: str, read: Checkpoint) -> nn.Module:
    return load_compressed(load_model(model), read.state_dict)


def _count(state_dict: Any) -> int:
    return sum(value.numel() for value in state_dict.values() if torch.is_tensor(value))


def _save(out: Path, module: nn.Module, read: Checkpoint, events: list[dict[str, Any]]) -> None:
    if out.suffix == ".safetensors":
        safetensors_for(out).save_model(module, str(out))
        return
    kept = {key: read.rest[key] for key in _KEPT if key in read.rest}
    history = [*history_of(read), *events]
    torch.save({"state_dict": module.state_dict(), **kept, "compressm": {"history": history}}, out)
