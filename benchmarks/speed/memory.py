"""What autograd keeps between the forward and the backward pass, by form and number of states."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.speed import peers
from benchmarks.speed.layers import FORCED, OURS, ours, scanned
from benchmarks.speed.results import Ratio, Row, Section
from benchmarks.speed.suites import LayerCase, SelectiveCase, Suite
from benchmarks.speed.timing import Report
from lightning_compressm.nn import LRU, S4D, S5
from lightning_compressm.nn._mamba import Mamba2Block, MambaBlock

NOTES = [
    "Bytes of all tensors that the backward pass keeps, every storage counted once and parameters "
    "not at all, over the bytes of the inputs. This is at its peak when the forward pass ends; "
    "buffers that live only within a pass are not counted.",
]


def saved_bytes(call: object, module: nn.Module, inputs: Tensor) -> int:
    """Bytes that the backward pass of `call()` keeps, without the parameters of `module`."""
    assert callable(call)
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    storages: dict[int, int] = {}
    kept = []  # an address may be used again once its storage is freed

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept.append(storage)
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = call(inputs)
    del outputs
    return sum(storages.values())


def run(suite: Suite, report: Report) -> list[Section]:
    """Count for all cases of a suite."""
    rows = []
    for case in suite.memory:
        report(f"memory at N={case.states}")
        rows += layer_rows(case)
    for mamba in suite.selective:
        rows += mamba_rows(mamba)
    return [Section("memory", "Memory kept for the backward pass", 1, rows, NOTES)]


def layer_rows(case: LayerCase) -> list[Row]:
    """Every form of the LRU, and the layers of the other kinds."""
    torch.manual_seed(0)
    shape = (case.batch, case.length, case.width)
    inputs = torch.randn(shape, requires_grad=True)
    layer = LRU(case.width, case.states)
    found = {}
    for name, form in {OURS: ours, FORCED: scanned, **peers.forms()}.items():
        if not isinstance(form, str):
            found[f"LRU, {name}"] = saved_bytes(lambda u, f=form: f(layer, u), layer, inputs)
    for kind in (S5, S4D):
        other = kind(case.width, case.states)
        found[f"{kind.__name__}, {OURS}"] = saved_bytes(other, other, inputs)
    sizes = f"B={case.batch} L={case.length} H={case.width}"
    return rows_of(sizes, case.states, found, inputs)


def mamba_rows(case: SelectiveCase) -> list[Row]:
    torch.manual_seed(0)
    inputs = torch.randn(case.batch, case.length, case.width, requires_grad=True)
    rows = []
    for states in case.states:
        found = {}
        for name, kind in (("Mamba block", MambaBlock), ("Mamba-2 block", Mamba2Block)):
            block = kind(case.width, states)
            found[name] = saved_bytes(block, block, inputs)
        sizes = f"B={case.batch} L={case.length} H={case.width}"
        rows += rows_of(sizes, states, found, inputs)
    return rows


def rows_of(sizes: str, states: int, found: dict[str, int], inputs: Tensor) -> list[Row]:
    own = inputs.untyped_storage().nbytes()
    return [
        Row(
            sizes,
            f"N={states}, {name}",
            {"/ inputs": Ratio((count / own,))},
            states,
            {"bytes": [count], "bytes of the inputs": [own]},
        )
        for name, count in found.items()
    ]
