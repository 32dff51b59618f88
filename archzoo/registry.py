"""A layer's name -> its class and its card. The decorator on the class is all the zoo needs to know of a layer."""

import importlib
import importlib.metadata
import inspect
import pkgutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Generic, Literal, TypeVar, get_args

from torch import nn

from archzoo.names import suggest

Kind = Literal["linear", "conv2d", "mixer", "module"]
KINDS: tuple[str, ...] = get_args(Kind)
ENTRY_POINT_GROUP = "archzoo.layers"

Module = TypeVar("Module", bound=type[nn.Module])
Item = TypeVar("Item", bound=Callable[..., Any])


def import_all(package: str) -> None:
    """Imports every module of a package, or one module, so that what registers there is known: nobody keeps a list."""
    for module in pkgutil.iter_modules(getattr(importlib.import_module(package), "__path__", ()), f"{package}."):
        importlib.import_module(module.name)


def forget_failed_imports(items: dict[str, Any], package: str) -> None:
    """Drops what modules of a package registered before they failed to import.

    So that nothing half imported stays, and a second try does not find its own names taken.
    """
    for name, item in list(items.items()):
        module = getattr(item, "cls", item).__module__
        if f"{module}.".startswith(f"{package}.") and module not in sys.modules:
            del items[name]


class Registry(Generic[Item]):
    """Names -> classes or functions of one sort, found by importing every module of one package.

    Args:
        what: What the names name, for messages, as `"task"`.
        package: The package whose modules register them, or the one module that does.
    """

    def __init__(self, what: str, package: str):
        self.what, self.package = what, package
        self._items: dict[str, Item] = {}
        self._imported = False

    def register(self, name: str) -> Callable[[Item], Item]:
        """Decorator that puts an item under a name; a ValueError if the name is taken."""

        def put(item: Item) -> Item:
            if name in self._items:
                raise ValueError(f"name={name!r}: this {self.what} is already registered; choose another name")
            self._items[name] = item
            return item

        return put

    def names(self) -> list[str]:
        """All names, sorted."""
        if not self._imported:
            self._imported = True  # first, for a module may ask for names while it is imported
            try:
                import_all(self.package)
            except BaseException:
                self._imported = False
                forget_failed_imports(self._items, self.package)
                raise
        return sorted(self._items)

    def get(self, name: str) -> Item:
        """The item of that name; a ValueError with the nearest names if there is none."""
        if name not in self.names():
            raise ValueError(f"{self.what} {name!r} is not registered; {suggest(name, self.names())}")
        return self._items[name]

    def create(self, name: str, /, *args: Any, **kwargs: Any) -> Any:
        """Calls the item of that name; a TypeError that names the argument it does not have."""
        item = self.get(name)
        check_arguments(f"{self.what} {name!r}", item, args, kwargs)
        return item(*args, **kwargs)


@dataclass(frozen=True, slots=True)
class Card:
    """Where a layer comes from, what it computes, and what of its paper this project reproduced."""

    title: str
    authors: str
    year: int
    arxiv: str
    """arXiv id, as `2404.19756`; empty where there is none."""
    equation: str
    """LaTeX, without dollar signs."""
    headline: str
    """The paper's headline result, in its own numbers."""
    reproduced: str
    """What this project re-ran, and what it got; says so where nothing was."""

    def __str__(self) -> str:
        source = f"arXiv:{self.arxiv}" if self.arxiv else "no arXiv paper"
        return (
            f"{self.title}\n  {self.authors}, {self.year}, {source}\n  {self.equation}\n"
            f"  paper:      {self.headline}\n  reproduced: {self.reproduced}"
        )


@dataclass(frozen=True, slots=True)
class LayerEntry:
    """What the registry holds of one layer."""

    name: str
    cls: type[nn.Module]
    kind: Kind
    card: Card
    nonlinear: bool
    """Whether the layer bends its input by itself, so that a model puts no activation behind it."""


_entries: dict[str, LayerEntry] = {}
_discovered = False


def register_layer(
    name: str, *, kind: Kind, card: Card, nonlinear: bool = False, replace: bool = False
) -> Callable[[Module], Module]:
    """Class decorator that puts a layer into the zoo.

    Args:
        name: The layer's name, in lower case with underscores.
        kind: What it stands in for: `"linear"`, `"conv2d"`, `"mixer"` or `"module"` (none of these).
        card: Its paper and result.
        nonlinear: Whether the layer is non-linear by itself; models then put no activation behind it.
        replace: Whether the name may be taken already, as when a notebook cell runs again.

    Raises:
        ValueError: If the name is taken or malformed, or the kind is unknown.

    >>> from archzoo import Card, create_layer, register_layer
    >>> @register_layer("twice", kind="linear", replace=True, card=Card("Twice", "me", 2026, "", "y = 2Wx", "-", "-"))
    ... class Twice(nn.Linear):
    ...     def forward(self, x):
    ...         return 2 * super().forward(x)
    >>> create_layer("twice", 3, 4)
    Twice(in_features=3, out_features=4, bias=True)
    """
    if not name.isidentifier() or name != name.lower():
        raise ValueError(f"name={name!r}: a layer's name is lower case, letters, digits and underscores, as 'fast_kan'")
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: must be one of {', '.join(map(repr, KINDS))}")

    def register(cls: Module) -> Module:
        if not replace and name in _entries:
            taken = _entries[name].cls
            raise ValueError(
                f"name={name!r}: already registered by {taken.__module__}.{taken.__qualname__}; "
                "choose another name, or pass replace=True"
            )
        _entries[name] = LayerEntry(name, cls, kind, card, nonlinear)
        return cls

    return register


def import_layers() -> None:
    """Imports every layer file of this package; a broken one raises, each time."""
    try:
        import_all("archzoo.layers")
    except BaseException:
        forget_failed_imports(_entries, "archzoo.layers")
        raise


def _discover() -> None:
    """Imports every layer file of this package, then what other packages declare. Runs once, at the first look-up."""
    global _discovered
    if _discovered:
        return
    _discovered = True  # first, for a layer file may look layers up while it is imported
    try:
        import_layers()
    except BaseException:
        _discovered = False
        raise
    for entry_point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        try:
            entry_point.load()
        except Exception as error:  # a broken plug-in must not take the zoo down with it
            forget_failed_imports(_entries, entry_point.module.partition(".")[0])
            warnings.warn(
                f"layers of entry point {entry_point.name!r} ({entry_point.value}) are missing: {error!r}", stacklevel=3
            )


def get_layer(name: str) -> LayerEntry:
    """The registry's entry of a layer.

    Raises:
        ValueError: If there is no layer of that name; the message suggests the nearest ones.
    """
    _discover()
    if name not in _entries:
        raise ValueError(f"layer {name!r} is not registered; {suggest(name, sorted(_entries))}")
    return _entries[name]


def list_layers(kind: Kind | None = None, pattern: str | None = None) -> list[str]:
    """Names of the registered layers, sorted.

    Args:
        kind: Only layers of this kind.
        pattern: Only names that match this glob, as `"*kan*"`.

    Raises:
        ValueError: If the kind is unknown.

    >>> import archzoo
    >>> archzoo.list_layers(kind="linear", pattern="lin*")
    ['linear']
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"kind={kind!r}: must be one of {', '.join(map(repr, KINDS))}")
    _discover()
    return sorted(
        entry.name
        for entry in _entries.values()
        if kind in (None, entry.kind) and (pattern is None or fnmatchcase(entry.name, pattern))
    )


def create_layer(name: str, *args: Any, **kwargs: Any) -> nn.Module:
    """Builds a layer by name; the other arguments go to its class.

    Raises:
        ValueError: If the name is not registered, or the layer refuses a value.
        TypeError: If the layer has no such argument, or misses one.

    >>> import archzoo
    >>> archzoo.create_layer("linear", 64, 32)
    Linear(in_features=64, out_features=32, bias=True)
    """
    entry = get_layer(name)
    check_arguments(f"layer {name!r}", entry.cls, args, kwargs)
    return entry.cls(*args, **kwargs)


def check_arguments(
    what: str, target: Callable[..., Any], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
) -> None:
    """Raises a TypeError that names the unknown or missing argument, and suggests the right one."""
    signature = inspect.signature(target)
    known = {n: p for n, p in signature.parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    takes_any = len(known) < len(signature.parameters)
    for key, value in (kwargs or {}).items():
        if key not in known and not takes_any:
            raise TypeError(f"{what} has no argument {key}={value!r}; {suggest(key, list(known))}")
    try:
        signature.bind(*args, **(kwargs or {}))
    except TypeError as error:
        raise TypeError(f"{what}: {error}; its arguments are {signature}") from None


def layer_options(name: str) -> dict[str, Any]:
    """The keyword options of a layer and their defaults, without sizes, bias, device and dtype."""
    signature = inspect.signature(get_layer(name).cls)
    return {
        n: p.default
        for n, p in signature.parameters.items()
        if p.kind is p.KEYWORD_ONLY and n not in ("device", "dtype")
    }


def card(name: str) -> Card:
    """The card of a layer: paper, equation, headline result, and what of it was reproduced here.

    Raises:
        ValueError: If the name is not registered.
    """
    return get_layer(name).card
