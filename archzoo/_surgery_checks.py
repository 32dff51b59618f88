"""What a swap must not break in silence: hooks, ties, parametrizations, and code that goes past a layer's forward."""

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from archzoo._surgery_adapters import HOOKS
from archzoo._surgery_attention import MixedAttention, turn_caches_off
from archzoo._surgery_measure import Measured
from archzoo._surgery_sites import Site

_STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_FACTS = ("dtype", "device", "shape", "size", "requires_grad")
"""Of a weight, that need not be its numbers."""


def refusals(model: nn.Module, sites: Iterable[Site], tried: bool) -> list[str]:
    """Why modules cannot be replaced, each with its name; finds the adapters of those that can.

    Args:
        model: The model.
        sites: The modules.
        tried: Whether a run will show which of them are called.
    """
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for prefix, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((module, f"{prefix}.{key}".lstrip(".")))
    wrappers = [m for m in model.modules() if _wraps(m)]
    found = []
    for site in sites:
        why = _refusal(site, owners, wrappers)
        if not why and not tried and (reader := _reader(site)):
            why = f"{reader} reads its weight, perhaps without calling it; give a batch as calibration, which will tell"
        if not why:
            try:
                site.prepare()
            except (ValueError, TypeError) as error:
                why = str(error)
        if why:
            found.append(f"{site.name}: {why}")
    return found


def never_called(sites: Iterable[Site], measured: Measured) -> list[str]:
    """Which modules have a reader of their weight, and were not called in a run of the model."""
    return [
        f"{site.name}: {reader} reads its weight and does not call it, so that no other layer could stand there"
        for site in sites
        if not measured.calls[site.module] and (reader := _reader(site))
    ]


def _reader(site: Site) -> str:
    """The module around that reads weight or bias of this one by itself, as its forward's source says; or ""."""
    for parent, key in site.slots:
        if parent is None or isinstance(parent, nn.TransformerEncoderLayer):  # whose fast path `settings` turns off
            continue
        cls: Any = type(parent)
        if key in _read_by(cls):
            return str(cls.__name__)
    return ""


@functools.cache
def _read_by(cls: Any) -> frozenset[str]:
    """The attributes of which a class's forward, or a method that this calls, takes the weight or the bias itself."""
    found: set[str] = set()
    seen: set[str] = set()
    waiting = ["forward"]
    while waiting:
        name = waiting.pop()
        method = getattr(cls, name, None)
        if name in seen or not inspect.isfunction(method):
            continue
        seen.add(name)
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(method))))
        except (OSError, TypeError, SyntaxError):  # made without a source
            continue
        harmless = {node.value for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr in _FACTS}
        for node in ast.walk(tree):
            match node:
                case ast.Attribute(ast.Attribute(ast.Name("self"), key), "weight" | "bias") if node not in harmless:
                    found.add(key)
                case ast.Call(ast.Attribute(ast.Name("self"), key)):
                    waiting.append(key)
    return frozenset(found)


def _wraps(module: nn.Module) -> bool:
    """Whether it holds on to the parameters of the modules in it, or to their code."""
    names = {cls.__name__ for cls in type(module).__mro__}
    return bool(names & {"DistributedDataParallel", "FullyShardedDataParallel", "ScriptModule"})


def _refusal(
    site: Site, owners: dict[int, list[tuple[nn.Module, str]]], wrappers: list[nn.Module]
) -> str:  # one reason is enough
    inside = set(site.module.modules())
    for wrapper in wrappers:
        if site.module in wrapper.modules():
            return f"{type(wrapper).__name__} holds on to what it wraps; swap before wrapping"
    for parent, _ in site.slots:
        if isinstance(parent, nn.MultiheadAttention):
            return "nn.MultiheadAttention reads the weights of its parts and never calls them"
    for module in inside:
        what = "it" if module is site.module else f"a {type(module).__name__} in it"
        if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
            return f"{what} is a {type(module).__name__}, which has no sizes yet; give the model an input first"
        if parametrize.is_parametrized(module):
            tensors = [name for name, _ in module.get_submodule("parametrizations").named_children()]
            return (
                f"{what} is parametrized ({', '.join(tensors)}), and no other layer would keep to that; first "
                f"torch.nn.utils.parametrize.remove_parametrizations(layer, {tensors[0]!r})"
            )
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            if type(hook).__module__.startswith("torch.nn.utils."):
                return f"{what} has the hook {type(hook).__name__}, which makes its weight anew; remove it first"
        if "forward" in vars(module):
            return f"the forward of {what} was exchanged for another, which would be lost; put its own back first"
        lost = _STATE_HOOKS if module is site.module else HOOKS + _STATE_HOOKS
        for name in lost:
            if getattr(module, name):
                return f"{what} has {name.strip('_').replace('_', ' ')}, which would be lost; remove them first"
        for key, parameter in module._parameters.items():
            if parameter is None:
                continue
            others = [name for owner, name in owners[id(parameter)] if owner not in inside]
            if others:
                return (
                    f"its {key} is tied with {others[0]}, and would be no longer; give it one of its own first, or "
                    f"leave it out by a rule before the others: {{{site.name!r}: None}}"
                )
            if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
                return f"its {key} has hooks, which would be lost; remove them first"
    return ""


def dress(site: Site, new: nn.Module) -> None:
    """Gives a new module what the old one had beside its function: hooks, frozen parameters.

    Hooks are not copied: both modules have the same dicts of them, so that handles remove them and `unswap` keeps them.

    Raises:
        ValueError: If both modules have hooks of one sort.
    """
    old = site.module
    if old in new.modules():  # an old one in a wrapper keeps what it has
        return
    for name in HOOKS:
        theirs, own = getattr(old, name), getattr(new, name)
        if own and own is not theirs:
            if theirs:
                raise ValueError(f"{site.name}: the new module has {name.strip('_').replace('_', ' ')} of its own too")
            continue
        setattr(new, name, theirs)
    if old._backward_hooks:
        new._is_full_backward_hook = old._is_full_backward_hook
    _freeze(old, new)


def _freeze(old: nn.Module, new: nn.Module) -> None:
    """Freezes a new parameter if the old one of its name is frozen, or, without such, if all others are."""
    before = dict(old.named_parameters())
    after = dict(new.named_parameters())
    others = [p.requires_grad for name, p in before.items() if name not in after]
    rest = any(others or [p.requires_grad for p in before.values()])
    for name, parameter in after.items():
        if before and not (before[name].requires_grad if name in before else rest):
            parameter.requires_grad_(False)


Setting = tuple[Any, str, Any]


def settings(model: nn.Module, pairs: Sequence[tuple[Site, nn.Module]]) -> list[Setting]:
    """Attributes to set, (object, name, value), so that code that goes past the new layers' forward is not taken.

    `nn.TransformerEncoderLayer` has a fast path for inference that reads the weights of the linear layers in it, and
    `nn.TransformerEncoder` one with nested tensors. Models of transformers keep a cache unless told not to.
    """
    parents = {parent for site, _ in pairs for parent, _ in site.slots}
    layers = {parent for parent in parents if isinstance(parent, nn.TransformerEncoderLayer)}
    stacks = [m for m in model.modules() if isinstance(m, nn.TransformerEncoder) and layers & set(m.modules())]
    mixed = any(isinstance(new, MixedAttention) for _, new in pairs)
    return [
        *((layer, "activation_relu_or_gelu", 0) for layer in layers),
        *((stack, "use_nested_tensor", False) for stack in stacks),
        *(turn_caches_off(model.modules()) if mixed else ()),
    ]
