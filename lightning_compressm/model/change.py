"""Change a model, what optimizes it and what averages it: all of it or nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack

from torch import nn
from torch.optim import Optimizer

from lightning_compressm._averages import averages_inside
from lightning_compressm._undo import all_or_nothing
from lightning_compressm.model.copies import ModelCopy, find_copies
from lightning_compressm.surgery.apply import apply_plan
from lightning_compressm.surgery.optimizer import (
    OptimizerStatePolicy,
    carry_gradients,
    rebind_optimizers,
)
from lightning_compressm.surgery.plan import SurgeryPlan

__all__ = ["change"]


def change(
    model: nn.Module,
    plan: SurgeryPlan,
    optimizers: Iterable[Optimizer] = (),
    policy: OptimizerStatePolicy = "transport",
    *,
    pending_gradients: bool = False,
    averages: Iterable[object] = (),
    twins: Mapping[str, str] | None = None,
    undo: ExitStack | None = None,
) -> None:
    """Change the model, its optimizers and averages of its weights, or leave all untouched.

    Args:
        model: the module that the plan was made for.
        plan: the plan of a :class:`~lightning_compressm.reduction.decision.Decision`.
        optimizers: every optimizer that holds parameters of the model.
        policy: what becomes of optimizer state.
        pending_gradients: carry ``.grad`` over too, where a step with it is still to come.
        averages: objects among which copies of the model, such as a running average of its weights,
            get the same projection; each ``AveragedModel`` inside the model gets it anyway.
        twins: path of a further average inside the model -> path of what it averages.
        undo: is given what takes everything back.

    Raises:
        CompreSSMError: if the plan does not fit; nothing was changed then.

    Example:
        >>> import torch
        >>> from lightning_compressm.surgery.plan import Select, TensorEdit
        >>> model, keep = nn.Linear(2, 4, bias=False), torch.tensor([0, 3])
        >>> optimizer, undo = torch.optim.SGD(model.parameters(), lr=0.1), ExitStack()
        >>> edit = TensorEdit(model.weight[keep], Select(0, keep))
        >>> change(model, SurgeryPlan({"weight": edit}), [optimizer], undo=undo)
        >>> optimizer.param_groups[0]["params"][0].shape
        torch.Size([2, 2])
        >>> undo.close()
        >>> model.weight.shape
        torch.Size([4, 2])
    """
    candidates = [*averages_inside(model), *averages]
    copies = find_copies(model, candidates) if candidates else []
    for path, original in (twins or {}).items():
        average = model.get_submodule(path)
        copies.append(ModelCopy(average, average, original))
    plans = [(copy.mirror, copy.plan(plan)) for copy in copies]
    with all_or_nothing(undo) as steps:
        replaced = apply_plan(model, plan, steps)
        if pending_gradients:
            carry_gradients(replaced)
        for i, (mirror, own) in enumerate(plans):
            followed = apply_plan(mirror, own, steps)
            # `Module.parameters()` gave optimizers those of averages inside the model too.
            replaced |= {f"copy{i}:{name}": one for name, one in followed.items()}
        rebind_optimizers(optimizers, replaced, policy, steps)
