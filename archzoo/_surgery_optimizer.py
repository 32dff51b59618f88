"""An optimizer's parameter groups after a swap, and back."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer


@dataclass
class Regrouping:
    """What a swap makes of an optimizer's groups; nothing has changed before `apply`."""

    optimizer: Optimizer
    before: list[dict[str, list[Any]]]
    after: list[dict[str, list[Any]]]
    """Per group, the lists that change: `params`, and `param_names` where there are some."""
    new: list[nn.Parameter]
    removed: list[nn.Parameter]
    state: dict[torch.Tensor, Any] = field(default_factory=dict)
    """What the optimizer knew of the removed ones."""

    def apply(self) -> None:
        """New parameters in, old ones out, and what was known of these put aside."""
        self.state = {p: self.optimizer.state.pop(p) for p in self.removed if p in self.optimizer.state}
        self._write(self.after)

    def check_undo(self) -> None:
        """A ValueError if the groups are no longer what `apply` made of them."""
        groups = self.optimizer.param_groups
        for index, lists in enumerate(self.after):
            now = groups[index]["params"] if index < len(groups) else []
            if [id(p) for p in now] != [id(p) for p in lists["params"]]:
                raise ValueError(f"optimizer: parameter group {index} has changed since the swap")

    def undo(self) -> None:
        """The groups as they were, with what was known of the old parameters."""
        for parameter in self.new:
            self.optimizer.state.pop(parameter, None)
        self._write(self.before)
        self.optimizer.state.update(self.state)

    def _write(self, groups: list[dict[str, list[Any]]]) -> None:
        for group, lists in zip(self.optimizer.param_groups, groups, strict=False):  # groups added since stay
            for key, values in lists.items():
                group[key][:] = values


def check_optimizer(optimizer: Any) -> None:
    """Raises unless its groups can be put right.

    Raises:
        TypeError: If it is no optimizer.
        ValueError: If it is L-BFGS, which knows the gradients of all parameters as one vector.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer={type(optimizer).__name__}: must be a torch.optim.Optimizer")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("optimizer=LBFGS: knows all parameters as one vector; make a new one after the swap")


def regroup(optimizer: Optimizer, swaps: Sequence[tuple[str, nn.Module, nn.Module]]) -> Regrouping:
    """The groups that a swap leads to.

    A new parameter goes where the old one of its name was; else, if it is a vector or a number, as biases and norms
    are, where an old one like it was; else where the largest old one was. If that was in no group, as frozen ones often
    are not, the new one is in none.

    Args:
        optimizer: The optimizer.
        swaps: Of each module its name, the old and the new one.

    Raises:
        ValueError: If the optimizer has none of the old parameters, or if a module without any gets some.
    """
    where = {p: index for index, group in enumerate(optimizer.param_groups) for p in group["params"]}
    anchored: dict[nn.Parameter, list[tuple[str, nn.Parameter]]] = {}
    locals_: dict[nn.Parameter, str] = {}
    new: dict[nn.Parameter, None] = {}  # ordered; a list would compare numbers
    removed: list[nn.Parameter] = []
    for name, old_module, new_module in swaps:
        old, fresh = dict(old_module.named_parameters()), dict(new_module.named_parameters())
        staying = set(fresh.values())
        locals_ |= {p: key for key, p in old.items()}
        removed += [p for p in old.values() if p not in staying]
        for key, parameter in fresh.items():
            if parameter in where or parameter in new or parameter in set(old.values()):
                continue
            if not old:
                raise ValueError(
                    f"optimizer: {name} had no parameter, so that no group is known for the {key} of the new layer; "
                    "call optimizer.add_param_group yourself"
                )
            anchor = _counterpart(key, parameter, old)
            if anchor in where:
                anchored.setdefault(anchor, []).append((key, parameter))
                new[parameter] = None
    if removed and not any(p in where for p in removed):
        raise ValueError("optimizer: has none of the parameters that are replaced; is it this model's?")
    gone = set(removed)
    before, after = [], []
    for group in optimizer.param_groups:
        keys: list[str] = [key for key in ("params", "param_names") if key in group]
        before.append({key: list(group[key]) for key in keys})
        lists: dict[str, list[Any]] = {key: [] for key in keys}
        for index, parameter in enumerate(group["params"]):
            full = group["param_names"][index] if "param_names" in group else ""
            prefix = full.removesuffix(locals_.get(parameter, ""))
            rows = [] if parameter in gone else [(full, parameter)]
            rows += [(prefix + key, p) for key, p in anchored.get(parameter, [])]
            lists["params"] += [p for _, p in rows]
            if "param_names" in group:
                lists["param_names"] += [text for text, _ in rows]
        after.append(lists)
    return Regrouping(optimizer, before, after, list(new), [p for p in removed if p in where])


def _counterpart(key: str, parameter: nn.Parameter, old: dict[str, nn.Parameter]) -> nn.Parameter:
    if key in old:
        return old[key]
    vectors = [p for p in old.values() if p.dim() <= 1]
    if parameter.dim() <= 1 and vectors:
        return vectors[0]
    return max(old.values(), key=lambda p: p.numel())
