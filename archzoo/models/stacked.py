"""Many models of one architecture, one for each seed, run as one batched model."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap


class Stacked(nn.Module):
    """N models of one architecture that do not know of each other, each fed its own part of a batch.

    A comparison of small models takes its time from calling operators, not from arithmetic: N models cost little more
    than one. Each parameter of the architecture is one parameter here, with a leading axis of N; `torch.func.vmap` runs
    the architecture over that axis. An optimizer that works element by element, as Adam and SGD, trains each model as
    if it were alone, where the loss is the sum of the models' losses: the gradients of one then do not depend on N.
    Randomness in a forward pass, as dropout or an NMU's noise, differs from model to model.

    What the training loop asks of layers it gets from here for all of them: `regularization_loss()`, `constrain_()`,
    `sparsity_weight`.

    Args:
        models: Of one architecture, in the same mode, on the same device. They are copied.

    Attributes:
        count: N.

    Shape: (batch, N, *input) -> (batch, N, *output).

    Raises:
        ValueError: If there are no models, or they differ in parameters or shapes; in forward, if the input has not N
            entries on its second axis.
    """

    _member: "_Member"

    def __init__(self, models: Sequence[nn.Module]):
        super().__init__()
        if not models:
            raise ValueError("models=[]: must be one model or more")
        shapes = [{name: tensor.shape for name, tensor in _tensors(model)} for model in models]
        if any(other != shapes[0] for other in shapes[1:]):
            raise ValueError("models: must be of one architecture, and these differ in parameters, buffers or shapes")
        parameters, buffers = stack_module_state(list(models))
        for name, tensor in parameters.items():
            trained = models[0].get_parameter(name).requires_grad
            self.register_parameter(_key(name), nn.Parameter(tensor.detach(), requires_grad=trained))
        for name, tensor in buffers.items():
            self.register_buffer(_key(name), tensor)
        self.count = len(models)
        # No submodule: the training loop would find its layers and their parameters, which are nobody's.
        self.__dict__["_member"] = _Member(copy.deepcopy(models[0]).to("meta"))
        self._losses: Tensor | None = None

    def train(self, mode: bool = True) -> "Stacked":
        """Sets the mode of all models."""
        super().train(mode)
        self._member.train(mode)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """(batch, N, *input) -> (batch, N, *output)."""
        if x.dim() < 2 or x.shape[1] != self.count:
            raise ValueError(
                f"input of shape {tuple(x.shape)}: must be (batch, {self.count}, …), a part for each model"
            )
        with self._member.forgetting():
            y, self._losses = vmap(
                lambda state, x: functional_call(self._member, state, (x,)),
                in_dims=(0, 1),
                out_dims=(1, 0),
                randomness="different",
            )(self._state(), x)
        return y

    def regularization_loss(self) -> Tensor:
        """What the layers of all models add to their losses, summed over models, for the last forward pass.

        A model whose loss is not finite adds nothing, as `finite_sum` has it.

        Raises:
            RuntimeError: If there was no forward pass since the last call.
        """
        if self._losses is None:
            raise RuntimeError("regularization_loss: the losses are those of a forward pass, and there was none")
        losses, self._losses = self._losses, None
        return finite_sum(losses)

    @torch.no_grad()
    def constrain_(self) -> None:
        """Calls `constrain_()` of every layer of every model. The training loop does so after each optimizer step."""
        if self._member.constrained:
            with self._member.forgetting():
                vmap(lambda state: functional_call(self._member, state, (None,)))(self._state())

    @property
    def sparsity_weight(self) -> float:
        """The `sparsity_weight` of the layers that have one; setting it sets theirs. An AttributeError if none has."""
        for layer in self._member.layers:
            if hasattr(layer, "sparsity_weight"):
                return float(layer.sparsity_weight)  # type: ignore[arg-type]
        raise AttributeError("no layer of the models has a sparsity_weight")

    @sparsity_weight.setter
    def sparsity_weight(self, value: float) -> None:
        for layer in self._member.layers:
            if hasattr(layer, "sparsity_weight"):
                setattr(layer, "sparsity_weight", value)  # noqa: B010 - mypy knows no such attribute

    @torch.no_grad()
    def member(self, index: int) -> nn.Module:
        """A copy of one of the models, as it is now."""
        state = self._state()
        member = copy.deepcopy(self._member).to_empty(device=next(iter(state.values())).device)
        for name, tensor in _tensors(member):
            tensor.data = state[name][index].detach().clone()
        return member.model

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that an optimizer does not decay in one of the models: biases, norms and gates.

        timm tells them by their number of axes, of which there is one more here.
        """
        return {
            _key(name) for name, p in self._member.model.named_parameters() if p.dim() <= 1 or name.endswith(".bias")
        }

    def extra_repr(self) -> str:
        """How many models, and of what architecture."""
        return f"{self.count} x\n{self._member.model}"

    def _state(self) -> dict[str, Tensor]:
        return {name: getattr(self, _key(name.removeprefix("model."))) for name in self._member.names}

    def __getstate__(self) -> dict[str, Any]:  # the losses belong to a graph
        return {**self.__dict__, "_losses": None}


def finite_sum(losses: Tensor) -> Tensor:
    """Sum of those of the losses (N,) that are finite, so that a model which diverges does not end the others' run.

    Nothing comes into its parameters any more but its own NaN.
    """
    return torch.where(losses.isfinite(), losses, 0.0).sum()


class _Member(nn.Module):
    """One of the models, for `torch.func.functional_call`: all that is done to it is done by `forward`."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.names = [name for name, _ in _tensors(self)]
        self.layers = list(model.modules())
        self.regularized = [m for m in model.modules() if callable(getattr(m, "regularization_loss", None))]
        self.constrained = [m for m in model.modules() if callable(getattr(m, "constrain_", None))]

    def forward(self, x: Tensor | None) -> tuple[Tensor, Tensor]:
        """The model's output, and what its layers add to its loss; without an input, constrains the layers."""
        loss = torch.zeros((), device="meta") if x is None else x.new_zeros(())
        if x is None:
            for layer in self.constrained:
                layer.constrain_()  # type: ignore[operator]  # a method of this name
            return loss, loss
        y = self.model(x)
        if self.training:  # here and not later: a layer may have looked at its inputs
            for layer in self.regularized:
                loss = loss + layer.regularization_loss()  # type: ignore[operator]  # a method of this name
        return y, loss

    @contextmanager
    def forgetting(self) -> Iterator[None]:
        """Leaves all layers as they were: what they keep of a pass under `vmap` is of no use once it is over."""
        before = [(module, dict(module.__dict__)) for module in self.layers]
        try:
            yield
        finally:
            for module, attributes in before:
                module.__dict__.clear()
                module.__dict__.update(attributes)


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _key(name: str) -> str:
    """A parameter's name without dots, which a name of one's own must not have."""
    return name.replace(".", ":")


def build_stacked(build: Callable[[], nn.Module], seeds: Sequence[int]) -> Stacked:
    """The models that `build` makes after `torch.manual_seed` of each seed."""
    models = []
    for seed in seeds:
        torch.manual_seed(seed)
        models.append(build())
    return Stacked(models)
