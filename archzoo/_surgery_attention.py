"""Self-attention inside a model, known by what is in it, and a mixer in its place."""

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from archzoo._surgery_adapters import Adapter, Make, layer_adapter

_PACKED = re.compile(r"w?qkv(_proj)?|c_attn|query_key_value|in_proj|W_pack", re.IGNORECASE)
_QUERY, _KEY, _VALUE = (
    re.compile(rf"{word}|{word[0]}|{word[0]}_(proj|lin)|{word}_proj|w{word[0]}|to_{word[0]}", re.IGNORECASE)
    for word in ("query", "key", "value")
)
_OUT = re.compile(r"(c_|o_|out_)?proj|o|out_lin|wo|to_out|dense|out", re.IGNORECASE)
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")


def is_attention(module: nn.Module) -> bool:
    """Whether a module holds queries, keys and values, by the names of its layers."""
    names = [name for name, child in module.named_children() if layer_adapter("linear", child)]
    return any(map(_PACKED.fullmatch, names)) or all(
        any(map(pattern.fullmatch, names)) for pattern in (_QUERY, _KEY, _VALUE)
    )


class _Attention(Adapter):
    """A mixer, called as the attention was. Whatever had no causal mask is mixed in both directions.

    The mixer has the number of heads of the attention, where it has heads, and positions of its own.
    """

    kind = "mixer"
    original = nn.Module
    what = "self-attention, a module with layers for queries, keys and values, as timm's and transformers'"

    def fits(self, module: nn.Module) -> bool:
        return is_attention(module) and not isinstance(module, nn.MultiheadAttention)

    def refusal(self, module: nn.Module) -> str:
        sizes = _sizes(module)
        if getattr(module, "is_cross_attention", False) or len({size for size, _ in sizes["in"]}) > 1:
            return "it looks at other tokens than its own; a mixer has one sequence"
        ends = [out for _, out in sizes["out"] or sizes["query"]]
        dim = sizes["in"][0][0]
        return "" if ends == [dim] else f"it maps {dim} features to {ends or 'an unknown number'}; a mixer keeps them"

    def arguments(self, layer: type[nn.Module], module: nn.Module) -> dict[str, Any]:
        known = inspect.signature(layer).parameters
        defaults: dict[str, Any] = {"num_heads": _heads(module), "causal": _is_causal(module)}
        defaults = {key: value for key, value in defaults.items() if key in known and value is not None}
        return {"dim": _sizes(module)["in"][0][0], "defaults": defaults}

    def build(self, make: Make, module: nn.Module, arguments: dict[str, Any]) -> nn.Module:
        options = dict(arguments)
        mixer = make(**options.pop("defaults") | options)
        forward = type(module).forward
        names = tuple(list(inspect.signature(forward).parameters)[1:])
        optional = "causal" in inspect.signature(make.entry.cls).parameters
        both = not _is_causal(module) and not optional and getattr(mixer, "causal", False)
        return MixedAttention(mixer, names, causal=_is_causal(module), both=both, pair=_returns_tuple(forward))

    def describe(self, arguments: dict[str, Any]) -> str:
        return str(arguments["dim"])


ATTENTION = _Attention()


class MixedAttention(nn.Module):
    """A mixer that is called as an attention of another library.

    Of what a model passes to its attention, tokens and masks are used: a mixer that takes scores gets the mask as it
    is; a scan gets from it which tokens are padding, those that the last token may not see, and refuses a mask that
    says more. Positions are passed over, for a mixer has its own. What would be answered wrongly is refused.

    Args:
        mixer: Maps (batch, length, dim) to itself.
        names: The arguments of the attention, in order, the first being the tokens.
        causal: Whether no token sees a later one.
        both: Whether the mean of the mixer and of the same mixer over the reversed tokens is taken.
        pair: Whether the output is returned with None, where the attention's weights were.

    Raises:
        ValueError: In `forward`, if there is a cache, another sequence to look at, or a mask that it cannot take.
    """

    def __init__(self, mixer: nn.Module, names: tuple[str, ...], *, causal: bool, both: bool, pair: bool):
        super().__init__()
        self.mixer, self.names, self.causal, self.both, self.pair = mixer, names, causal, both, pair
        known = inspect.signature(mixer.forward).parameters
        self.mask = next((name for name in ("attn_mask", "mask") if name in known), "")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Mixes the tokens, which are the first argument."""
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        x = given.pop(self.names[0])
        mask = None
        for name, value in given.items():
            if value is None or value is False:
                continue
            self._check(name)
            if "mask" in name:
                if mask is not None:
                    raise ValueError(f"{name}: a mixer in the place of an attention takes one mask, this is the second")
                mask = self._mask(name, value)
        y = self.mixer(x, **self._masked(mask))
        if self.both:
            y = (y + self.mixer(x.flip(1), **self._masked(None if mask is None else mask.flip(-1))).flip(1)) / 2
        return (y, None) if self.pair else y

    def _check(self, name: str) -> None:
        here = "a mixer in the place of an attention"
        if name.startswith("past") or name in ("cache", "layer_past", "use_cache"):
            raise ValueError(f"{name}: {here} keeps no cache; call the model with use_cache=False")
        if name in ("encoder_hidden_states", "key_value_states", "context"):
            raise ValueError(f"{name}: {here} has one sequence, and looks at no other")
        if name == "output_attentions":
            raise ValueError(f"{name}: {here} has no weights of attention to return")
        if name == "is_causal" and not self.causal:
            raise ValueError(f"{name}: {here} that was not causal is built to look both ways")

    def _mask(self, name: str, mask: Tensor) -> Tensor:
        """For a mixer with scores the mask itself; for a scan (batch, length), True at tokens that are no padding."""
        if not self.mask:
            raise ValueError(f"{name}: {type(self.mixer).__name__} takes no mask; leave it out, and pad no sequence")
        if mask.dim() != 4:
            raise ValueError(
                f"{name} of shape {tuple(mask.shape)}: must be (batch, heads, length, length), as transformers makes "
                "it for attn_implementation='sdpa'; windows of an image are not mixed across their borders"
            )
        if self.mask == "attn_mask":
            return mask
        allowed = mask if mask.dtype == torch.bool else mask == 0
        seen = allowed[:, 0, -1]
        if not torch.compiler.is_compiling() and not self._is_padding(allowed, seen):
            raise ValueError(
                f"{name}: {type(self.mixer).__name__} in the place of an attention takes padding alone, and this mask "
                "has a window, or several sequences in one; put a mixer with scores there, as 'attention'"
            )
        return seen

    def _is_padding(self, allowed: Tensor, seen: Tensor) -> bool:
        """Whether a mask (batch, heads, queries, keys) says no more than which keys are seen, and causality."""
        usual = seen[:, None, None, :].expand_as(allowed)
        if self.causal:
            usual = usual.tril(allowed.shape[-1] - allowed.shape[-2])
        right = (usual == allowed).all(-1)
        if allowed.shape[-2] == allowed.shape[-1]:  # padding itself may see nothing, or all, which spares a softmax NaN
            right |= ~seen[:, None, :] & (allowed.all(-1) | ~allowed.any(-1))
        return bool(right.all())

    def _masked(self, mask: Tensor | None) -> dict[str, Tensor]:
        return {} if mask is None else {self.mask: mask}

    def extra_repr(self) -> str:
        """How it mixes."""
        return f"causal={self.causal}, both={self.both}"


def turn_caches_off(modules: Iterable[nn.Module]) -> list[tuple[Any, str, Any]]:
    """Settings (object, name, value) by which models of transformers keep no cache unless they are told to."""
    configs = [getattr(m, key, None) for m in modules for key in ("config", "generation_config")]
    unique = {id(config): config for config in configs if getattr(config, "use_cache", False) is True}
    return [(config, "use_cache", False) for config in unique.values()]


def _sizes(module: nn.Module) -> dict[str, list[tuple[int, int]]]:
    """(in, out) of the linear layers, by what they are for: "in" are all those for queries, keys and values."""
    found: dict[str, list[tuple[int, int]]] = {"in": [], "query": [], "out": []}
    for name, child in module.named_children():
        adapter = layer_adapter("linear", child)
        if adapter is None:
            continue
        usual = adapter.usual(child)
        size = usual.in_features, usual.out_features
        if any(pattern.fullmatch(name) for pattern in (_PACKED, _QUERY, _KEY, _VALUE)):
            found["in"].append(size)
            found["query"] += [size] if _QUERY.fullmatch(name) else []
        elif _OUT.fullmatch(name):
            found["out"].append(size)
    return found


def _heads(module: nn.Module) -> int | None:
    places = (module, getattr(module, "config", None))
    values = (getattr(place, name, None) for place in places for name in _HEADS)
    return next((value for value in values if isinstance(value, int)), None)


def _is_causal(module: nn.Module) -> bool:
    return bool(getattr(module, "is_causal", False))


def _returns_tuple(forward: Callable[..., Any]) -> bool:
    """Whether a function ends by returning several values, as its source says."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(forward))))
    except (OSError, TypeError, SyntaxError):
        return False
    returns = [node.value for node in ast.walk(tree) if isinstance(node, ast.Return)]
    return any(isinstance(value, ast.Tuple) for value in returns)
