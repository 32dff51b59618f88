"""Sampling from a language model, token by token: temperature, top-k, top-p and a seed, for any model with a cache."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
from torch import Tensor, nn

from archzoo.kernels._op import running_sum


class CausalLM(nn.Module, ABC):
    """A language model that reads a text piece by piece, and so can write: (batch, length) ids -> logits.

    A subclass gives `new_cache` and `next_logits`.
    """

    @abstractmethod
    def new_cache(self) -> list[Any]:
        """An empty cache, a list of what each block keeps of the tokens it has seen.

        A copy by `copy.deepcopy` goes its own way; `reorder(rows)` of each entry takes other sequences of the batch.
        """

    @abstractmethod
    def next_logits(self, ids: Tensor, cache: list[Any]) -> Tensor:
        """Logits (B, V) of the token behind ids (B, L), which follow those that the cache has seen."""

    def for_inference(self) -> Self:
        """What computes the same without dropout: the model itself in evaluation mode, else a copy of it."""
        training = any(module.training for module in self.modules())
        return copy.deepcopy(self).eval() if training else self

    def generate(
        self,
        ids: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> Iterator[Tensor]:
        """Yields the tokens (B,) that follow a prompt (B, L), as they are drawn, without dropout.

        A model in training mode is copied first; call `eval()` of a large one.

        `torch.stack(list(model.generate(ids, 10)), 1)` are the next 10.

        Args:
            ids: The prompt (B, L), one token at least.
            max_new_tokens: How many tokens to draw.
            temperature: Divides the logits; 0 takes the likeliest token.
            top_k: Draw from the k likeliest tokens only; None: from all.
            top_p: Draw from the fewest likeliest tokens whose probability adds up to at least this much.
            seed: The same seed draws the same tokens; None: from torch's global state.

        Raises:
            ValueError: If the prompt is empty or an option out of range; at once, not with the first token.
        """
        model, cache = self.for_inference(), self.new_cache()
        return stream(
            lambda new: model.next_logits(new, cache),
            ids,
            max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
        )


def next_tokens(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draws one token for each row of logits.

    Args:
        logits: (B, V).
        temperature: Divides the logits; 0 takes the largest.
        top_k: Draw from the k likeliest tokens only.
        top_p: Draw from the fewest likeliest tokens whose probability adds up to at least this much.
        generator: Source of randomness, on the logits' device; by default torch's global one.

    Returns:
        Token ids (B,).

    Raises:
        ValueError: If an option is out of range.
    """
    _check(temperature, top_k, top_p)
    if temperature == 0:
        return logits.argmax(-1)
    scores = logits.float()
    # The largest is 0, so that none overflows; a temperature that float32 has not is as good as the least it has.
    scores = (scores - scores.amax(-1, keepdim=True)) / max(temperature, 1e-30)
    ids: Tensor | None = None
    if top_k is not None or top_p is not None:
        count = scores.shape[-1] if top_k is None else min(top_k, scores.shape[-1])
        scores, ids = scores.topk(count)  # in descending order
    probabilities = scores.softmax(-1)
    if top_p is not None:
        before = running_sum(probabilities, -1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0.0)  # never the first, before which is nothing
    drawn = torch.multinomial(probabilities, 1, generator=generator)
    return (drawn if ids is None else ids.gather(-1, drawn)).squeeze(-1)


def stream(
    step: Callable[[Tensor], Tensor],
    ids: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
) -> Iterator[Tensor]:
    """Yields the tokens that a model puts behind a prompt, as they are drawn.

    Args:
        step: Maps the ids (B, L) that it has not seen yet to the logits (B, V) of the token behind them; it keeps what
            it needs of those before. Called with the prompt first, then with one token a time.
        ids: The prompt (B, L), one token at least.
        max_new_tokens: How many tokens to draw.
        temperature: As in `next_tokens`, like `top_k` and `top_p`.
        top_k: As there.
        top_p: As there.
        seed: The same seed draws the same tokens, whatever else draws random numbers; None: from torch's global state.

    Yields:
        Token ids (B,).

    Raises:
        ValueError: If the prompt is empty or an option out of range; at once, not with the first token.
    """
    _check(temperature, top_k, top_p)
    if ids.dim() != 2 or ids.shape[1] == 0 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(
            f"ids of shape {tuple(ids.shape)} and {ids.dtype}: must be a prompt (batch, length) of one token at least, "
            "whole numbers"
        )
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens!r}: must be a whole number, 0 or more")
    generator = None if seed is None else torch.Generator(ids.device).manual_seed(seed)
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    return _draw(step, ids, max_new_tokens, generator, options)


def _draw(
    step: Callable[[Tensor], Tensor],
    ids: Tensor,
    max_new_tokens: int,
    generator: torch.Generator | None,
    options: dict[str, float | int | None],
) -> Iterator[Tensor]:
    new = ids
    for _ in range(max_new_tokens):
        with torch.no_grad():  # not around the yield, where it would reach the caller
            token = next_tokens(step(new), generator=generator, **options)  # type: ignore[arg-type]
        yield token
        new = token[:, None].to(ids.dtype)


def _check(temperature: float, top_k: int | None, top_p: float | None) -> None:
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature={temperature!r}: must be a finite number, 0 or more")
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
        raise ValueError(f"top_k={top_k!r}: must be a whole number, 1 or more, or None")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p!r}: must be above 0 and at most 1, or None")
