"""Where a swap cuts: rules, and the modules that they choose."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from archzoo._surgery_adapters import Adapter, Make, find_adapter, first_tensor
from archzoo.layers.start import Start
from archzoo.names import suggest
from archzoo.registry import LayerEntry, get_layer

Predicate = Callable[[str, nn.Module], bool]
Factory = Callable[[nn.Module], nn.Module]
Rule = str | type[nn.Module] | Predicate
Choice = str | tuple[str, Mapping[str, Any]] | Factory | None
Rules = Mapping[str, Choice] | Mapping[type[nn.Module], Choice] | Mapping[Rule, Choice]
"""A mapping is invariant in its keys: without the first two, type checkers would refuse a dict of globs."""


@dataclass(frozen=True)
class Target:
    """What takes a module's place: a layer of the zoo with its options, or what a function makes of the module."""

    entry: LayerEntry | None
    options: Mapping[str, Any]
    factory: Factory | None = None

    @property
    def name(self) -> str:
        """The layer's name, or the function's."""
        return self.entry.name if self.entry else getattr(self.factory, "__name__", repr(self.factory))


@dataclass(eq=False)
class Site:
    """One module to replace, at every place where it stands."""

    module: nn.Module
    names: tuple[str, ...]
    target: Target
    rule: int
    """Which of the rules chose it."""
    slots: list[tuple[nn.Module | None, str]] = field(default_factory=list)
    """(parent, key) of every place; (None, "") is the root."""
    owner: nn.Module | None = None
    """The nearest module around it that has a forward, which lists and dicts of modules have not."""
    adapter: Adapter | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    made: nn.Module | None = None
    """What the factory made."""

    @property
    def name(self) -> str:
        """The first of its names; the root's is its type."""
        return self.names[0] or type(self.module).__name__

    def prepare(self) -> None:
        """Finds the adapter and the arguments.

        Raises:
            ValueError: If the layer cannot stand in for the module, or an option is one that the module decides.
        """
        entry, options = self.target.entry, self.target.options
        if entry is None:
            return
        self.adapter = find_adapter(entry, self.module)
        self.arguments = self.adapter.arguments(entry.cls, self.module)
        tensor = first_tensor(self.module)
        if tensor is not None:
            self.arguments = {"device": tensor.device, "dtype": tensor.dtype} | self.arguments
        for key in options.keys() & (self.arguments.keys() - {"padding_mode"}):
            raise ValueError(f"{key}={options[key]!r}: this is taken from the original layer; leave it out")

    def build(self, options: Mapping[str, Any], sizes: Mapping[str, int], device: Any = None) -> nn.Module:
        """The new module, with these options and other sizes, on this device rather than the original's."""
        entry, adapter = self.target.entry, self.adapter
        if entry is None or adapter is None:
            assert self.made is not None
            return self.made

        arguments = {**self.arguments, **options, **sizes} | ({"device": device} if device else {})
        return adapter.build(Make(entry), self.module, arguments)

    def start(self, options: Mapping[str, Any]) -> Start[nn.Module]:
        """The new module, as near to the trained one as it can start; a ValueError if it cannot."""
        assert self.target.entry is not None
        assert self.adapter is not None
        return self.adapter.start(self.target.entry, self.module, dict(options))

    @property
    def place(self) -> str:
        """What stands there now, with its sizes."""
        text = self.adapter.describe(self.arguments) if self.adapter else ""
        return f"{type(self.module).__name__}({text})"


def parse_target(choice: Any, options_per_layer: Mapping[str, Mapping[str, Any]]) -> Target | None:
    """What a rule leads to; None if what it matches stays.

    Raises:
        TypeError: If it is neither a name, a name with options, a function nor None.
        ValueError: If there is no such layer.
    """
    if choice is None:
        return None
    if isinstance(choice, str):
        return Target(get_layer(choice), dict(options_per_layer.get(choice, {})))
    match choice:
        case (str(name), Mapping() as options):
            return Target(get_layer(name), {**options_per_layer.get(name, {}), **options})
    if isinstance(choice, type) or not callable(choice):
        raise TypeError(
            f"rules: {choice!r} must be a layer's name, as 'kan', a name with options, as ('kan', {{'grid_size': 8}}), "
            "a function of the module that returns the new one, or None to leave what the rule matches as it is"
        )
    return Target(None, {}, choice)


def parse_rules(
    rules: Mapping[Any, Any], options_per_layer: Mapping[str, Mapping[str, Any]]
) -> list[tuple[Rule, Target | None]]:
    """The rules, checked.

    Raises:
        TypeError: If there is none, if one is neither a glob, a type nor a predicate, or if options are given to a
            layer that no rule names.
        ValueError: If there is no layer of a name.
    """
    if not isinstance(rules, Mapping) or not rules:
        raise TypeError(f"rules={rules!r}: must be a dict of one rule or more, as {{'blocks.*.mlp.fc*': 'kan'}}")
    for rule in rules:
        if not (isinstance(rule, str) or (isinstance(rule, type) and issubclass(rule, nn.Module)) or callable(rule)):
            raise TypeError(f"rules: {rule!r} must be a glob, a type of module, or a function (name, module) -> bool")
    for key, options in options_per_layer.items():
        if not isinstance(options, Mapping):
            raise TypeError(
                f"swap() takes {key}={options!r}: must be a dict of options of a layer {key!r} of the rules"
            )
    parsed = [(rule, parse_target(choice, options_per_layer)) for rule, choice in rules.items()]
    named = sorted({target.entry.name for _, target in parsed if target and target.entry})
    for key, options in options_per_layer.items():
        if key not in named:
            hint = suggest(key, named) if named else "no rule names a layer"
            raise TypeError(f"swap() has no argument {key}={options!r}, and no rule a layer of that name; {hint}")
    return parsed


def _plain_type(module: nn.Module) -> type:
    """A module's type; of one with parametrizations, whose type torch exchanges, the type it had before."""
    return type(module).__bases__[0] if parametrize.is_parametrized(module) else type(module)


def _matches(rule: Rule, name: str, module: nn.Module) -> bool:
    if isinstance(rule, str):
        return fnmatchcase(name, rule) if name else not rule  # "*" is everything in the model, not the model
    if isinstance(rule, type):
        return _plain_type(module) is rule
    return bool(rule(name, module))


def rule_text(rule: Rule) -> str:
    """A rule as a message names it."""
    if isinstance(rule, str):
        return repr(rule)
    return getattr(rule, "__qualname__", repr(rule))


def find_sites(model: nn.Module, rules: list[tuple[Rule, Target | None]]) -> tuple[list[Site], list[Rule]]:
    """The modules to replace, in the model's order, and the rules that chose none.

    A module that stands at several places is one, and is chosen if any of its names is. What is inside a module that is
    replaced goes with it, and is not looked at.
    """
    names: dict[nn.Module, list[str]] = {}
    chosen: dict[nn.Module, int] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
        for index, (rule, _) in enumerate(rules[: chosen.get(module, len(rules))]):
            if _matches(rule, name, module):
                chosen[module] = index
                break
    sites: dict[nn.Module, Site] = {}
    kept: set[int] = set()
    for parent, owner, key, module in _slots(model, chosen, rules):
        index = chosen.get(module, -1)
        target = rules[index][1] if index >= 0 else None
        if target is None:
            kept.add(index)
            continue
        site = sites.setdefault(module, Site(module, tuple(names[module]), target, index))
        site.slots.append((parent, key))
        site.owner = owner
    used = kept | {site.rule for site in sites.values()}
    return list(sites.values()), [rule for index, (rule, _) in enumerate(rules) if index not in used]


def _slots(
    model: nn.Module, chosen: Mapping[nn.Module, int], rules: list[tuple[Rule, Target | None]]
) -> Iterator[tuple[nn.Module | None, nn.Module | None, str, nn.Module]]:
    """(parent, owner, key, module) of every place in the model, but for those inside a module that is replaced."""
    seen = set()

    def visit(
        parent: nn.Module | None, owner: nn.Module | None, key: str, module: nn.Module
    ) -> Iterator[tuple[nn.Module | None, nn.Module | None, str, nn.Module]]:
        yield parent, owner, key, module
        if module in seen or (module in chosen and rules[chosen[module]][1] is not None):
            return
        seen.add(module)
        inner = owner if isinstance(module, nn.ModuleList | nn.ModuleDict) else module
        for name, child in module._modules.items():
            if child is not None:
                yield from visit(module, inner, name, child)

    return visit(None, None, "", model)


def unmatched_message(model: nn.Module, unmatched: list[Rule]) -> str:
    """What to say of rules that chose nothing."""
    texts = []
    for rule in unmatched:
        text = f"rule {rule_text(rule)} matches no module of the model"
        if isinstance(rule, str):
            known = [name for name, _ in model.named_modules() if name]
            near = suggest(rule, known) if known else "which has none"
            text += f" (or only what is inside another that is replaced); {near}" if near.startswith("did") else ""
        elif isinstance(rule, type):
            others = sorted({type(m).__name__ for m in model.modules() if isinstance(m, rule)})
            if others:
                text += (
                    f"; a type matches that very type, not {', '.join(others)}: "
                    "name these, or give a function (name, module) -> bool"
                )
        texts.append(text)
    return "; ".join(texts) + ". allow_unmatched=True lets this pass"
