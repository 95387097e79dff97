"""One layer on its way through a proposal, in step over all processes, whatever happens to it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NoReturn, TypeVar

from torch import Tensor, nn

from lightning_compressm.errors import (
    CompreSSMError,
    IllConditionedError,
    NonFiniteError,
    UnstableSystemError,
)
from lightning_compressm.families import Family, SelectiveFamily
from lightning_compressm.model.layers import SSMLayer
from lightning_compressm.reduction.analysis import Attempt, LayerAnalysis
from lightning_compressm.reduction.failures import (
    LinAlgError,
    Reach,
    TroubleError,
    describe,
    reach_of,
)
from lightning_compressm.reduction.linear import analyse_linear
from lightning_compressm.reduction.policy import ReductionPolicy
from lightning_compressm.reduction.recorder import Context
from lightning_compressm.reduction.selective import analyse_selective

__all__ = ["Examination", "RemoteAnalysis", "analyse_layer"]

T = TypeVar("T")


class Examination:
    """The analysis of one layer, and attempts to reduce it.

    Out of memory, the work is done again on copies on the CPU. Numerical trouble, or no room there
    either, leaves the layer as it is: in all processes alike, with a warning.

    All processes hold the same linear layers, so one of them, the owner, does the work for all.
    :meth:`prepare` and :meth:`prepare_attempt` do it ahead, without waiting for other processes.

    Args:
        layer: to be analysed; it is not changed.
        policy: how.
        context: what is known of the data.
        owner: number of the process that works on a linear layer.
        spectrum_only: no attempt is expected to follow, so nothing is computed for one.

    Attributes:
        analysis: ``None`` if the layer was not or can't be analysed.
        failure: why the layer stays as it is; empty as long as nothing failed.

    Example:
        >>> from lightning_compressm.model.layers import find_ssm_layers
        >>> from lightning_compressm.nn import LRU
        >>> layer = find_ssm_layers(LRU(4, 8))[""]
        >>> examination = Examination(layer, ReductionPolicy(state_dim=3), Context())
        >>> examination.analyse()
        >>> examination.attempt(3, seed=0).order
        3
    """

    def __init__(
        self,
        layer: SSMLayer,
        policy: ReductionPolicy,
        context: Context,
        owner: int = 0,
        *,
        spectrum_only: bool = False,
    ) -> None:
        self.layer = layer
        self.failure = ""
        self.analysis: LayerAnalysis | None = None
        self._policy = policy
        self._context = context
        self._spectrum_only = spectrum_only
        self._note = ""
        self._shared = isinstance(layer.family, Family) and context.processes.size > 1
        self._owner = owner if self._shared else context.processes.rank
        self._ahead: Callable[[], Any] | None = None

    @property
    def _mine(self) -> bool:
        return self._owner == self._context.processes.rank

    def prepare(self) -> None:
        """Analyse ahead, where this process does it for all."""
        if self._shared and self._mine:
            self._ahead = _done(lambda: self._analysed(lambda: None))

    def analyse(self) -> None:
        """Analyse the layer; to be called once, on all processes."""
        self._guarded(lambda: None)
        if self._shared and not self.failure:
            mine = self.analysis
            known = (None, 0.0) if mine is None else (mine.sigma.cpu(), mine.seconds)
            sigma, seconds = self._give(known)
            assert sigma is not None
            self.analysis = mine or RemoteAnalysis(self.layer, sigma, seconds)
        self._check_energy()

    def _check_energy(self) -> None:
        """A share of no energy says nothing of how many states to keep."""
        by_energy = self._policy.tolerance is not None and not self._spectrum_only
        if by_energy and self.analysis is not None and not self.analysis.sigma.any():
            self._give_up(
                "it has zero Hankel energy, since its inputs never reach its outputs (B or C is "
                "zero); give `state_dim` or `fraction` to reduce it all the same"
            )

    def prepare_attempt(self, order: int, *, seed: int) -> None:
        """Do the work of :meth:`attempt` ahead, where this process does it for all."""
        if self._shared and self._mine and not self.failure:
            self._ahead = _done(lambda: self._analysed(lambda: self._attempt(order, seed)))

    @property
    def sigma(self) -> Tensor | None:
        """The layer's HSVs, on its device."""
        if self.analysis is None:
            return None
        home = next(self.layer.module.parameters()).device
        return self.analysis.sigma if home.type == "mps" else self.analysis.sigma.to(home)

    @property
    def seconds(self) -> float:
        """Time taken by the analysis."""
        return 0.0 if self.analysis is None else self.analysis.seconds

    def attempt(self, order: int, *, seed: int) -> Attempt:
        """Reduce the layer to ``order`` states, the same on all processes, or say why not."""
        processes = self._context.processes
        attempt = None if self.failure else self._guarded(lambda: self._attempt(order, seed))
        if self.failure:
            return self._left_alone()
        attempt = self._give(attempt)
        assert attempt is not None
        note = "; ".join(filter(None, [attempt.note, self._note]))
        # Orders steer what is exchanged next, so rounding must not make them differ.
        return replace(attempt, order=processes.agree(attempt.order), note=note)

    def _attempt(self, order: int, seed: int) -> Attempt:
        assert self.analysis is not None
        try:
            return self.analysis.attempt(order, self._policy, seed)
        except (NonFiniteError, UnstableSystemError) as error:
            # The layer itself was found to be finite and stable: this is about its reduction.
            raise IllConditionedError(str(error)) from error

    def _left_alone(self) -> Attempt:
        return Attempt(plan=None, order=self.layer.state_dim, note=self.failure)

    def _guarded(self, work: Callable[[], T]) -> T | None:
        """The result of ``work`` after an analysis; ``None`` if the layer has to stay as it is.

        It is ``None`` as well where another process does the work.
        """
        processes = self._context.processes
        here: Callable[[], T | None] = self._ahead or (lambda: self._analysed(work))
        self._ahead = None
        try:
            return processes.together(here if self._mine else lambda: None)
        except TroubleError as trouble:
            reason = trouble.reason
            again = trouble.reach is Reach.DEVICE and not self._note
        if again:
            # Outside of the handler, so that the exception lets go of what it holds in memory.
            self.analysis = None
            self._note = f"analysed on the CPU ({reason})"
            return self._guarded(work)
        self._give_up(f"{reason} (on the CPU as well)" if self._note else reason)
        return None

    def _give(self, value: T) -> T:
        return self._context.processes.give(value, self._owner) if self._shared else value

    def _analysed(self, work: Callable[[], T]) -> T:
        if not self._note:
            self.analysis = self.analysis or self._analyse(self.layer, self._context)
            return work()
        try:
            self.analysis = self.analysis or self._analyse_on_cpu()
            return work()
        except (CompreSSMError, TroubleError):
            raise
        except Exception as error:
            if reach_of(error) is not Reach.RUN:
                raise
            # Kernels that need another device are no reason to stop.
            raise LinAlgError(describe(error)) from error

    def _analyse_on_cpu(self) -> LayerAnalysis:
        layer = _on_cpu(self.layer)
        inputs = [x.cpu() for x in self._context.inputs.get(layer.name, ())]
        context = replace(self._context, inputs={layer.name: inputs})
        return self._analyse(layer, context)

    def _analyse(self, layer: SSMLayer, context: Context) -> LayerAnalysis:
        return analyse_layer(layer, self._policy, context, spectrum_only=self._spectrum_only)

    def _give_up(self, reason: str) -> None:
        self.analysis = None
        self.failure = reason
        name, family = self.layer.name, self.layer.family.name
        warnings.warn(f"layer '{name}' ({family}) is left as it is: {reason}", stacklevel=5)


@dataclass(frozen=True, eq=False)
class RemoteAnalysis(LayerAnalysis):
    """What is known of a layer that another process has analysed.

    Example:
        >>> RemoteAnalysis.__base__.__name__
        'LayerAnalysis'
    """

    def attempt(self, order: int, policy: ReductionPolicy, seed: int) -> Attempt:
        """Is the other process' work."""
        raise NotImplementedError("only the process that analysed a layer can reduce it")


def _done(work: Callable[[], T]) -> Callable[[], T]:
    """Do something now; what comes of it, result or exception, comes when it is called."""
    try:
        result = work()
    except Exception as error:
        failure = error
        if reach_of(error) is Reach.DEVICE:
            failure.__traceback__ = None  # its frames hold the memory that is missing
        return partial(_raise, failure)
    return lambda: result


def _raise(error: Exception) -> NoReturn:
    raise error


def analyse_layer(
    layer: SSMLayer, policy: ReductionPolicy, context: Context, *, spectrum_only: bool = False
) -> LayerAnalysis:
    """Analyse one layer as its family asks for, only for its spectrum or for reductions as well.

    Example:
        >>> from lightning_compressm.model.layers import find_ssm_layers
        >>> from lightning_compressm.nn import LRU
        >>> layer = find_ssm_layers(LRU(4, 8))[""]
        >>> analyse_layer(layer, ReductionPolicy(), Context()).sigma.shape
        torch.Size([8])
    """
    if isinstance(layer.family, Family):
        return analyse_linear(
            layer, layer.family, policy, context.lengths, spectrum_only=spectrum_only
        )
    assert isinstance(layer.family, SelectiveFamily)
    return analyse_selective(layer, layer.family, policy, context)


def _on_cpu(layer: SSMLayer) -> SSMLayer:
    """The same layer, copied tensor by tensor: a copy on its own device would need room there."""
    memo: dict[int, object] = {}
    for parameter in layer.module.parameters():
        copied = nn.Parameter(parameter.detach().cpu().clone(), parameter.requires_grad)
        copied.__dict__.update(parameter.__dict__)
        memo[id(parameter)] = copied
    for buffer in layer.module.buffers():
        memo[id(buffer)] = buffer.detach().cpu().clone()
    return replace(layer, module=deepcopy(layer.module, memo))
