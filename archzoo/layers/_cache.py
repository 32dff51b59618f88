"""What a mixer keeps of the tokens it has seen, so that a further one costs one token's work."""

import inspect
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn


class KeyValueCache:
    """Keys and values of one attention layer, for one batch. Each layer of a model needs its own.

    Memory grows by doubling: a token is copied about twice in all. A copy by `copy.deepcopy` goes its own way, as the
    beams of a search do. For inference: what is in the cache has no gradient.

    Attributes:
        length: Number of tokens seen.
    """

    def __init__(self) -> None:
        self.length = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Adds tokens, and returns all there are.

        Args:
            keys: (B, L, heads, head_dim), turned and scaled as they are to be used.
            values: Likewise.

        Returns:
            Keys and values (B, `length`, heads, head_dim), views of the cache.

        Raises:
            ValueError: If they need gradients, or are of another shape, dtype or device than those before.
        """
        _check_inference(keys, values)
        self._keys, self._values = self._room(self._keys, keys), self._room(self._values, values)
        end = self.length + keys.shape[1]
        self._keys[:, self.length : end] = keys
        self._values[:, self.length : end] = values
        self.length = end
        return self._keys[:, :end], self._values[:, :end]

    def reorder(self, rows: Tensor) -> None:
        """Replaces sequence i of the batch by sequence `rows[i]`; a row may be taken more than once, or left out."""
        if self._keys is not None and self._values is not None:
            self._keys, self._values = self._keys[rows], self._values[rows]

    def _room(self, memory: Tensor | None, new: Tensor) -> Tensor:
        """Memory of which the first `length` tokens are those seen, with room for the new ones."""
        batch, length, *head = new.shape
        if memory is None:
            return new.new_empty(batch, length, *head)
        if (memory.shape[0], *memory.shape[2:]) != (batch, *head) or (memory.dtype, memory.device) != (
            new.dtype,
            new.device,
        ):
            raise ValueError(
                f"tokens of shape {tuple(new.shape)}, {new.dtype} on {new.device}: the cache holds "
                f"{self.length} of shape {tuple(memory[:, : self.length].shape)}, {memory.dtype} on {memory.device}"
            )
        if self.length + length <= memory.shape[1]:
            return memory
        larger = new.new_empty(batch, max(2 * memory.shape[1], self.length + length), *head)
        larger[:, : self.length] = memory[:, : self.length]
        return larger


class StateCache:
    """The state of one recurrent mixer, as Mamba, for one batch: its size does not grow.

    Attributes:
        state: What the mixer's `forward` returns with `return_state=True`; None before the first token.
    """

    def __init__(self) -> None:
        self.state: Any = None

    def mix(self, mixer: nn.Module, x: Tensor) -> Tensor:
        """The mixer's outputs (B, L, dim) for tokens x (B, L, dim) behind those that it has seen."""
        if self.state is None or x.shape[1] != 1:
            y, self.state = mixer(x, state=self.state, return_state=True)
            _check_inference(y)
            return y
        states = self.state if isinstance(self.state, tuple) else (self.state,)
        y, *states = mixer.step(x, *states)  # type: ignore[operator]  # a method of this name
        self.state = tuple(states) if isinstance(self.state, tuple) else states[0]
        return y

    def reorder(self, rows: Tensor) -> None:
        """Replaces sequence i of the batch by sequence `rows[i]`."""
        if isinstance(self.state, tuple):
            self.state = tuple(part[rows] for part in self.state)
        elif self.state is not None:
            self.state = self.state[rows]


class InputCache:
    """All inputs so far of one mixer that can only map whole sequences: a token costs what the whole text does.

    Attributes:
        inputs: (B, length, dim), None before the first token.
    """

    def __init__(self) -> None:
        self.inputs: Tensor | None = None

    def mix(self, mixer: nn.Module, x: Tensor) -> Tensor:
        """The mixer's outputs (B, L, dim) for tokens x (B, L, dim) behind those that it has seen."""
        _check_inference(x)
        self.inputs = x if self.inputs is None else torch.cat([self.inputs, x], 1)
        y: Tensor = mixer(self.inputs)[:, -x.shape[1] :]
        return y

    def reorder(self, rows: Tensor) -> None:
        """Replaces sequence i of the batch by sequence `rows[i]`."""
        self.inputs = None if self.inputs is None else self.inputs[rows]


Cache = KeyValueCache | StateCache | InputCache


def cache_for(mixer: nn.Module) -> Cache:
    """An empty cache of the kind that a mixer can use, the cheapest first."""
    takes = inspect.signature(mixer.forward).parameters
    if "cache" in takes:
        return KeyValueCache()
    return StateCache() if "return_state" in takes and hasattr(mixer, "step") else InputCache()


def _check_inference(*tensors: Tensor) -> None:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise ValueError("gradients are asked for: a cache is for inference, under torch.no_grad()")


C = TypeVar("C")


def one_each(cache: Sequence[C] | None, layers: int) -> Sequence[C | None]:
    """A cache for each layer, or None for each; a ValueError if there are more or fewer."""
    if cache is None:
        return [None] * layers
    if len(cache) != layers:
        raise ValueError(f"cache of {len(cache)}: must be {layers}, one for each block, as new_cache() makes them")
    return cache
