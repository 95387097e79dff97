"""The contract of an SSM architecture: how to read its systems and how to write them back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_compressm._tensors import refuse_parametrized
from lightning_compressm.control import DiagonalLTI, Projection, Reduction
from lightning_compressm.control.balance import Balance, BalanceChoice, resolve_balance
from lightning_compressm.errors import UnsupportedLayerError
from lightning_compressm.surgery.plan import MomentRule, Refill, SurgeryPlan, TensorEdit, take

__all__ = ["Family", "FamilyBase"]


class FamilyBase(ABC):
    """What every SSM architecture has in common; subclass :class:`Family` for your own layer.

    Attributes:
        name: short name, shown in tables and histories.
        layers: whose layers these are, for the table of supported layers.
        state_dim_attributes: integer attributes that follow the state dimension where a layer has
            them and they equal the old one.
        length_dim: which dimension of the layer's input is time.
        needs_data: whether a layer can only be analysed on its inputs.

    Example:
        >>> from lightning_compressm.families import registered_families
        >>> isinstance(registered_families()["LRU"], FamilyBase)
        True
    """

    name: ClassVar[str]
    layers: ClassVar[str] = ""
    state_dim_attributes: ClassVar[tuple[str, ...]] = (
        "d_state",
        "state_dim",
        "state_features",
        "state_size",
        "N",
    )
    length_dim: ClassVar[int] = -2
    needs_data: ClassVar[bool] = False

    @abstractmethod
    def matches(self, module: nn.Module) -> bool:
        """Whether this family knows how to reduce ``module``."""

    @abstractmethod
    def state_axes(self, module: nn.Module) -> dict[str, int]:
        """Names of the parameters and buffers that have a state dimension -> which one it is."""

    def example(self, d_state: int = 8) -> tuple[nn.Module, Tensor]:
        """A small layer of this family and an input for it, for the contract tests."""
        raise NotImplementedError(f"{type(self).__name__} ships no example layer")

    def refuse(self, module: nn.Module) -> None:  # noqa: B027
        """Raise ``UnsupportedLayerError`` if ``module`` is one that can't be reduced safely."""

    def sequence_length(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
        """Steps of the sequence in a call of the layer; ``None`` if the call does not tell."""
        tensors = [t for t in (*args, *kwargs.values()) if torch.is_tensor(t)]
        if not tensors or tensors[0].ndim < 2:
            return None
        return int(tensors[0].shape[self.length_dim])

    def inputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
        """The input in a call of a layer that needs data; ``None`` if there is none."""
        return None

    def shared_attributes(self, model: nn.Module, state_dims: Mapping[str, int]) -> dict[str, Any]:
        """Attributes of the whole model that say how many states its layers have.

        Args:
            model: the root of the model.
            state_dims: path of each of its layers of this family -> its state dimension to be.
        """
        return {}

    def attributes(self, module: nn.Module, state_dim: int) -> dict[str, Any]:
        """Attributes of the layer that follow the state dimension, with their new values."""
        old = self.state_dim(module)
        return {
            name: state_dim
            for name in self.state_dim_attributes
            if getattr(module, name, None) == old and not _is_computed(module, name)
        }

    def state_dim(self, module: nn.Module) -> int:
        """The current state dimension N."""
        name, dim = next(iter(self.state_axes(module).items()))
        return int(shape_source(module, name).shape[dim])

    def state_dim_in(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> int | None:
        """The state dimension of a saved layer, or ``None`` if its tensors are not there."""
        for name, dim in self.state_axes(module).items():
            saved = tensors.get(name)
            if saved is not None and saved.ndim == shape_source(module, name).ndim:
                return int(saved.shape[dim])
        return None

    def entries(self, module: nn.Module, index: Tensor) -> dict[str, tuple[int, Tensor]]:
        """Which entries of each tensor belong to the states in ``index``, shape (r,).

        Returns:
            Tensor name -> dimension, and indices along it that leave these states (and all that
            belongs to no state); 2-D where each slice along dimension 0 has indices of its own.
        """
        return {name: (dim, index) for name, dim in self.state_axes(module).items()}

    @abstractmethod
    def projected_plan(self, module: nn.Module, projection: Mapping[str, Tensor]) -> SurgeryPlan:
        """The plan that lets a copy with other values, an average of weights, follow a reduction.

        Args:
            module: a layer with the structure and size that the reduced one had.
            projection: what the reduction's plan holds for it in ``projections``.
        """

    def resize_plan(self, module: nn.Module, state_dim: int) -> SurgeryPlan:
        """The plan that gives ``module`` another state dimension before weights are loaded.

        Only the shapes matter: leading states are kept, new ones repeat the last.
        """
        index = torch.arange(state_dim).clamp_(max=self.state_dim(module) - 1)
        return self.kept_plan(module, index)

    def kept_plan(self, module: nn.Module, index: Tensor) -> SurgeryPlan:
        """The plan that leaves the states in ``index``, shape (r,), exactly as they are."""
        edits = {}
        for name, (dim, entries) in self.entries(module, index).items():
            tensor = tensor_of(module, name).detach()
            edits[name] = TensorEdit(take(tensor, dim, entries))
        return SurgeryPlan(edits, self.attributes(module, len(index)))


class Family(FamilyBase):
    """One linear time-invariant SSM architecture, read and written as a diagonal system.

    Subclass it and :func:`register_family` it to support a layer. A family never imports the
    package whose layers it knows: it matches by structure or by qualified class name. Four methods
    are needed: :meth:`matches`, :meth:`state_axes`, :meth:`system` and :meth:`write`;
    :meth:`example` makes the contract tests pick it up.

    Attributes:
        name: short name, shown in tables and histories.
        layers: whose layers these are, for the table of supported layers.
        state_dim_attributes: integer attributes that follow the state dimension where a layer has
            them and they equal the old one.
        length_dim: which dimension of the layer's input is time.
        only_balance: the one form in which layers can be written, also while training goes on;
            None for any.

    Example:
        >>> import torch
        >>> from lightning_compressm.families import find_family
        >>> from lightning_compressm.nn import LRU
        >>> find_family(LRU(4, 8)).name
        'LRU'
    """

    only_balance: ClassVar[Balance | None] = None

    def balance_for(
        self, asked: BalanceChoice, system: DiagonalLTI, *, trained_on: bool = False
    ) -> Balance:
        """The form that a layer's system is reduced in.

        Args:
            asked: by the user.
            system: the layer's.
            trained_on: whether the layer is trained further.

        Raises:
            UnsupportedLayerError: if another form than the only possible one is asked for.
        """
        only = self.only_balance
        if only is None:
            return resolve_balance(asked, system, trained_on=trained_on)
        if asked not in ("auto", only):
            raise UnsupportedLayerError(
                f"{self.name}: expected balance={only!r} or 'auto', the only form in which this "
                f"layer can be written, got balance={asked!r}; choose one of these, or put it into "
                "`ignore`."
            )
        return only

    @abstractmethod
    def system(self, module: nn.Module) -> DiagonalLTI:
        """The layer as a linear time-invariant system, on the layer's device.

        Where gradients are enabled they reach the layer's parameters, if you want to train with
        :class:`~lightning_compressm.HankelRegularizer`.
        """

    @abstractmethod
    def write(self, module: nn.Module, system: DiagonalLTI) -> dict[str, Tensor]:
        """The layer's tensors (all names of :meth:`state_axes`) that realise ``system``."""

    def sequences(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> tuple[Tensor, Tensor] | None:
        """Input and output of the system in a call of the layer; ``None`` if there are none.

        Task-aware Gramians are recorded from both. The default takes the first tensor of the call
        and of what it returns, with time at ``length_dim`` and channels last (or beside it).

        Args:
            module: the layer.
            args: of the call.
            kwargs: of the call.
            output: what it returned.

        Returns:
            Real tensors of two or three dimensions, as they are: the second one gets a gradient.
        """
        returned = output if isinstance(output, tuple | list) else (output,)
        inputs, response = _first_tensor((*args, *kwargs.values())), _first_tensor(returned)
        if inputs is None or response is None or inputs.ndim != response.ndim:
            return None
        if inputs.ndim not in (2, 3):
            return None
        real = inputs.is_floating_point() and response.is_floating_point()
        return (inputs, response) if real else None

    def moment_rules(
        self, module: nn.Module, reduction: Reduction, values: Mapping[str, Tensor]
    ) -> dict[str, MomentRule]:
        """How optimizer moments of each tensor follow; the default refills them."""
        return {name: Refill() for name in values}

    def reduction_plan(self, module: nn.Module, reduction: Reduction) -> SurgeryPlan:
        """The plan that turns ``module`` into its reduced self."""
        values = self.write(module, reduction.system)
        rules = self.moment_rules(module, reduction, values)
        edits = {
            name: TensorEdit(value.to(tensor_of(module, name).dtype), rules[name])
            for name, value in values.items()
        }
        attributes = self.attributes(module, reduction.system.order)
        return SurgeryPlan(edits, attributes, {"": Projection.of(reduction).to_dict()})

    def projected_plan(self, module: nn.Module, projection: Mapping[str, Tensor]) -> SurgeryPlan:
        """The same change of basis, truncated to the same states."""
        with torch.no_grad():
            system = Projection.from_dict(projection).apply(self.system(module).double())
        edits = {
            name: TensorEdit(value.to(tensor_of(module, name).dtype))
            for name, value in self.write(module, system).items()
        }
        return SurgeryPlan(edits, self.attributes(module, system.order))


def _first_tensor(values: Iterable[Any]) -> Tensor | None:
    return next((value for value in values if torch.is_tensor(value)), None)


def _is_computed(module: nn.Module, name: str) -> bool:
    """A property without a setter follows by itself."""
    attribute = getattr(type(module), name, None)
    return isinstance(attribute, property) and attribute.fset is None


def tensor_of(module: nn.Module, name: str) -> Tensor:
    """The parameter or buffer with a dotted name.

    Raises:
        UnsupportedLayerError: if it is parametrized: then it is a new tensor at each look.

    Example:
        >>> from torch import nn
        >>> tensor_of(nn.Sequential(nn.Linear(2, 3)), "0.weight").shape
        torch.Size([3, 2])
    """
    path, _, key = name.rpartition(".")
    refuse_parametrized(module.get_submodule(path), key)
    return shape_source(module, name)


def shape_source(module: nn.Module, name: str) -> Tensor:
    """The tensor with a dotted name, or what a parametrization computes in its place.

    Example:
        >>> from torch import nn
        >>> shape_source(nn.Linear(2, 3), "weight").shape
        torch.Size([3, 2])
    """
    path, _, key = name.rpartition(".")
    tensor: Tensor = getattr(module.get_submodule(path), key)
    return tensor
