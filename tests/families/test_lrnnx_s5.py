"""The S5 of lrnnx, by a layer with its parameters."""

from copy import deepcopy
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_compressm import CompreSSMCallback, compress, find_ssm_layers, load_compressed
from lightning_compressm.errors import UnsupportedLayerError
from lightning_compressm.families.lrnnx_s5 import LrnnxS5Example, LrnnxS5Family
from lightning_compressm.testing.helpers import reduce
from tests.callbacks.helpers import BATCHES, StatefulLoader, same, trainer


def _layer(states: int = 8) -> LrnnxS5Example:
    torch.manual_seed(0)
    return LrnnxS5Example(3, states).double()


@pytest.mark.parametrize("method", ["zoh", "dirac"])
def test_the_system_is_what_a_recurrence_computes(method: str):
    layer = _layer()
    layer.discretization = method
    poles = torch.complex(-nn.functional.softplus(layer.A[:, 0]), layer.A[:, 1])
    step = layer.log_dt.exp()
    eigenvalues = (poles * step).exp()
    gain = (eigenvalues - 1) / poles if method == "zoh" else torch.ones_like(poles)
    system = LrnnxS5Family().system(layer)
    torch.testing.assert_close(system.eigenvalues, eigenvalues)
    torch.testing.assert_close(system.B, gain.unsqueeze(-1) * layer.B)


@pytest.mark.parametrize("method", ["bilinear", "no_discretization", None])
def test_discretizations_with_poles_outside_are_refused(method: str | None):
    layer = _layer()
    layer.discretization = method
    with pytest.raises(UnsupportedLayerError, match=r"discretization='zoh' or 'dirac', got"):
        compress(layer, state_dim=2)
    assert find_ssm_layers(layer)[""].state_dim == 8


def test_another_balance_is_refused():
    with pytest.raises(UnsupportedLayerError, match="expected balance='modes' or 'auto'"):
        compress(_layer(), state_dim=2, balance="folded")


def test_kept_states_keep_their_moments():
    layer = _layer()
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.randn(2, 9, 3, dtype=torch.float64)).square().sum().backward()
    optimizer.step()
    before = {n: optimizer.state[p]["exp_avg_sq"].clone() for n, p in layer.named_parameters()}
    poles = layer.A.detach().clone()
    reduce(LrnnxS5Family(), layer, 3, optimizer)
    kept = [int((poles == pole).all(-1).nonzero()) for pole in layer.A]
    after = {n: optimizer.state[p]["exp_avg_sq"] for n, p in layer.named_parameters()}
    for name, dim in LrnnxS5Family().state_axes(layer).items():
        assert torch.equal(after[name], before[name].index_select(dim, torch.tensor(kept)))


def test_an_average_keeps_the_same_states_with_an_output_matrix_of_its_own():
    layer = _layer()
    average = deepcopy(layer)
    with torch.no_grad():
        average.C.mul_(2)
        average.B.add_(1)
    model = nn.ModuleDict({"net": layer, "ema": average.requires_grad_(False)})
    compress(model, state_dim=3, averages=["ema"])
    assert torch.equal(average.A, layer.A)
    torch.testing.assert_close(average.B, layer.B + 1)
    torch.testing.assert_close(average.C, 2 * layer.C)


def test_a_layer_that_nothing_reaches_stays_silent():
    layer = _layer()
    with torch.no_grad():
        layer.B.zero_()
    family = LrnnxS5Family()
    reduce(family, layer, 2)
    inputs = torch.randn(1, 5, 3, dtype=torch.float64)
    torch.testing.assert_close(layer(inputs), inputs @ layer.D)


class _Module(pl.LightningModule):
    """The layer between linear maps, for the task of the callbacks' tests."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(1, 3), LrnnxS5Example(3, 8), nn.Linear(3, 3)).double()
        self.losses: list[float] = []

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], index: int) -> torch.Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x).mean(1), y)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


@pytest.mark.parametrize("options", [{"tolerance": 0.2, "window": (0.0, 0.5)}, {}])
def test_a_run_is_reduced_reloaded_and_resumed_to_the_bit(options: dict, tmp_path: Path) -> None:
    def run(path: Path | None) -> tuple[_Module, object]:
        model = _Module()
        callback = CompreSSMCallback(**options, verbose=False)
        saver = ModelCheckpoint(tmp_path / str(path is None), "{step}", save_top_k=-1)
        fit = trainer(tmp_path, callback, saver, max_epochs=4, enable_checkpointing=True)
        fit.fit(model, StatefulLoader(), ckpt_path=path)
        return model, fit.optimizers[0].state_dict()

    whole, moments = run(None)
    assert whole.net[1].d_state < 8
    loaded = load_compressed(_Module(), tmp_path / "True" / f"step={4 * BATCHES}.ckpt")
    assert same(loaded.state_dict(), whole.state_dict())
    for step in (BATCHES, 3 * BATCHES):
        model, again = run(tmp_path / "True" / f"step={step}.ckpt")
        assert model.losses == whole.losses[step:]
        assert same(model.state_dict(), whole.state_dict())
        assert same(again, moments)
