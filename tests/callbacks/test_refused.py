"""What can't work is refused before the first step, by a real Trainer, with the model untouched."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelPruning
from lightning.pytorch.strategies import DDPStrategy

from lightning_compressm import CompreSSMCallback, errors
from lightning_compressm.model.resizing import install_resize_hooks
from lightning_compressm.nn._mamba import MambaBlock

from ..families.layers import PortedLRU
from .helpers import Classifier, Plain, loader, trainer
from .refused import REFUSED, Model, Refused, changed


@pytest.mark.parametrize("refused", REFUSED, ids=lambda refused: refused.what)
def test_refused_before_the_first_step(refused: Refused, tmp_path: Path) -> None:
    untouched = refused.model().state_dict()
    error, model = refused.provoke(tmp_path)
    assert type(error).__name__ == refused.error
    assert isinstance(error, errors.CompreSSMError | ValueError)
    assert re.search(refused.message, str(error)), str(error)
    assert not model.losses
    for name, value in model.state_dict().items():
        assert value.shape == untouched[name].shape


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_weights_must_find_their_way_back_to_the_main_process(method: str, tmp_path: Path) -> None:
    """Which runs no callback, so that nothing but the model itself can take smaller layers."""
    strategy = DDPStrategy(process_group_backend="gloo", start_method=method)  # type: ignore[arg-type]
    fit = trainer(tmp_path, strategy=strategy, devices=2)
    foreign = changed(lambda net: setattr(net, "first", PortedLRU(4, 4, 8)))
    with pytest.raises(errors.UnsupportedStrategyError, match=r"'net\.first' can't load.*install"):
        CompreSSMCallback().setup(fit, foreign, "fit")
    install_resize_hooks(foreign)
    for model in (foreign, Model()):
        CompreSSMCallback().setup(fit, model, "fit")


def test_ranks_that_would_drift_apart_are_refused(tmp_path: Path) -> None:
    """Below 2.6 Lightning itself leaves them with different weights."""
    strategy = DDPStrategy(process_group_backend="gloo", static_graph=True)
    vars(strategy).pop("_pl_static_graph_delay_done", None)
    fit, model = trainer(tmp_path, strategy=strategy, devices=2), Model()
    CompreSSMCallback().setup(fit, model, "fit")
    model.automatic_optimization = False
    with pytest.raises(errors.UnsupportedStrategyError, match=r"static_graph.*Lightning 2\.6"):
        CompreSSMCallback().setup(fit, model, "fit")


def test_pruning_is_fine_where_the_ssm_layers_have_nothing_to_prune(tmp_path: Path) -> None:
    """An LRU has neither `weight` nor `bias`, which is what is pruned if no list is given."""
    model = Classifier(dtype="float32")
    callback = CompreSSMCallback(state_dim=5, verbose=False)
    trainer(tmp_path, ModelPruning("l1_unstructured", amount=0.3), callback).fit(model, loader())
    assert model.net.first.d_state == 5
    assert (model.net.encoder.weight == 0).any()


def test_pruning_of_an_ignored_ssm_layer_is_fine(tmp_path: Path) -> None:
    model = Plain().float()
    assert isinstance(model.net.first, MambaBlock)
    pruning = ModelPruning("l1_unstructured", [(model.net.first.in_proj, "weight")], amount=0.3)
    callback = CompreSSMCallback(state_dim=5, ignore=["net.first"], verbose=False)
    trainer(tmp_path, callback, pruning).fit(model, loader())
    assert model.net.second.d_state == 5
    assert (model.net.first.in_proj.weight == 0).any()
    assert torch.isfinite(torch.tensor(model.losses)).all()
