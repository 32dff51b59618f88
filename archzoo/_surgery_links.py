"""Hidden widths that a swap may change: two replaced layers with nothing but elementwise functions between them."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from archzoo._surgery_elementwise import is_elementwise, of_module
from archzoo._surgery_sites import Site


@dataclass(frozen=True, eq=False)
class Link:
    """A width that is free: outputs of one new layer that are the inputs of another and go nowhere else.

    Or a width inside one new module, which is source and target then.
    """

    source: Site
    target: Site
    width: int
    """In the original."""
    splits: bool = False
    """Whether to choose it makes two layers of one."""


def find_links(sites: Sequence[Site]) -> list[Link]:
    """The hidden widths of the layers that are replaced, as `hidden` of fc1 -> act -> fc2.

    Two layers are linked if the module around them passes the output of the first to the second through elementwise
    functions alone, and nowhere else. That is read off its forward, which torch.fx follows without numbers; where that
    cannot be, as with a forward that asks for its input's shape, off its attributes: at least one module that is
    elementwise, and no other, stands between the two. A function is elementwise if a change of one number of its input
    changes nothing but that number of its output, which is tried. Layers that stand at several places, and convolutions
    in groups, keep their sizes. Last come the widths inside single modules, as of a whole perceptron.
    """
    by_owner: dict[nn.Module, dict[nn.Module, Site]] = {}
    for site in sites:
        if site.adapter and site.adapter.resizable(site.module) and len(site.slots) == 1 and site.owner is not None:
            by_owner.setdefault(site.owner, {})[site.module] = site
    links = []
    for owner, inside in by_owner.items():
        if len(inside) < 2:
            continue
        for first, second in _follow(owner, inside):
            source, target = inside[first], inside[second]
            assert source.adapter is not None
            assert target.adapter is not None
            width = source.arguments[source.adapter.outputs]
            if source.adapter.axis == target.adapter.axis and width == target.arguments[target.adapter.inputs]:
                links.append(Link(source, target, width))
    return links + [link for link in _inner_widths(sites) if not link.splits]


def find_splits(sites: Sequence[Site], links: Sequence[Link]) -> list[Link]:
    """The widths through which a single layer may be split in two, of layers with no width that is free already."""
    linked = {site for link in links for site in (link.source, link.target)}
    return [link for link in _inner_widths(sites) if link.splits and link.source not in linked]


def _inner_widths(sites: Sequence[Site]) -> Iterator[Link]:
    for site in sites:
        adapter = site.adapter
        if adapter and adapter.inner and adapter.inner not in site.target.options:
            width = adapter.inner_width(site.module)
            if width:
                yield Link(site, site, width, adapter.splits)


class _Around(fx.Tracer):
    """Follows the forward of one module, not those of the modules in it."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _follow(owner: nn.Module, inside: dict[nn.Module, Site]) -> Iterator[tuple[nn.Module, nn.Module]]:
    """The layers whose output reaches another layer, and that one."""
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            graph = _Around().trace(owner)
    except Exception:  # a forward of someone else's, run with stand-ins for its input, may raise anything
        yield from _neighbours(owner, inside)
        return
    modules = {n: owner.get_submodule(str(n.target)) for n in graph.nodes if n.op == "call_module"}
    called = list(modules.values())
    for node, module in modules.items():
        if module not in inside or called.count(module) > 1:
            continue
        axis = _axis(inside[module])
        here = node
        while len(here.users) == 1:
            before, here = here, next(iter(here.users))
            inputs = [arg for arg in (*here.args, *here.kwargs.values()) if isinstance(arg, fx.Node)]
            if not here.args or here.args[0] is not before:
                break
            reached = modules.get(here)
            if reached in inside:
                if called.count(reached) == 1:
                    yield module, reached
                break
            if len(inputs) != 1 or not is_elementwise(_function(here, reached), axis):
                break


def _neighbours(owner: nn.Module, inside: dict[nn.Module, Site]) -> Iterator[tuple[nn.Module, nn.Module]]:
    """The layers that stand one after the other among the attributes, elementwise modules between them."""
    source, between = None, 0
    for module in owner._modules.values():
        if module in inside:
            if source is not None and between:
                yield source, module
            source, between = module, int(_ends_in_function(inside[module]))
        elif source is not None and module is not None and is_elementwise(of_module(module), _axis(inside[source])):
            between += 1
        else:
            source = None


def _ends_in_function(site: Site) -> bool:
    assert site.adapter is not None
    return site.adapter.activated(site.module)


def _axis(site: Site) -> int:
    assert site.adapter is not None
    return site.adapter.axis


def _function(node: fx.Node, module: nn.Module | None) -> Callable[[Tensor], Any] | None:
    """What a node of a graph computes of its first argument."""
    if module is not None:
        return of_module(module)
    function = getattr(Tensor, str(node.target)) if node.op == "call_method" else node.target
    if node.op not in ("call_method", "call_function") or not callable(function):
        return None
    return lambda x: function(x, *node.args[1:], **node.kwargs)
