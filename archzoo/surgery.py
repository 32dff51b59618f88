"""Swap layers inside a model that already exists.

A rule says which modules, and what takes their place. A transformer's perceptrons of KAN layers, as large as before:

>>> import torch
>>> from torch import nn
>>> import archzoo
>>> block = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
>>> model = nn.Sequential(block, nn.Linear(64, 10))
>>> report = archzoo.swap(model, {"0.*[13]": "kan"}, match="params")
>>> print(report)
name   original           layer                       parameters                start
0.1    Linear(64 -> 256)  kan(64 -> 32, grid_size=4)  16,640 -> 16,416          fresh
0.3    Linear(256 -> 64)  kan(32 -> 64, grid_size=4)  16,448 -> 16,448          fresh
model                                                 33,866 -> 33,642 (-0.7%)
matched: grid_size=4 of kan, hidden widths 256 -> 32

The model is changed in place. `archzoo.unswap(report)` puts the very same modules back:

>>> archzoo.unswap(report) is model
True

Trained weights are kept where a layer can start from them, and a batch says how well:

>>> x = torch.randn(32, 64)
>>> report = archzoo.swap(model, {nn.Linear: "paon"}, init="from_original", calibration=x)
>>> [(row.name, row.start) for row in report.swaps]
[('0.1', 'exact'), ('0.3', 'exact'), ('1', 'exact')]

A rule may name what is larger than a layer, and the kind of layer says what becomes of it. Linear layers take a whole
perceptron, gated or not, and `conv2d` layers one of 1x1 convolutions; its activation goes if they bend their input by
themselves. A mixer takes self-attention; `capsules` take the linear layer that a classifier ends with. Structures are
known by their parts, so that the same rules serve the families of timm and of transformers:

>>> import timm
>>> vit = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
>>> rules = {"blocks.*.mlp": "kan", "blocks.*.attn": "mamba", "head": "capsules"}
>>> report = archzoo.swap(vit, rules)
>>> [(row.name, row.original, f"{row.layer}({row.sizes})") for row in report.swaps[1:3]]
[('blocks.0.mlp', 'Mlp(32 -> 128 -> 32)', 'kan(32 -> 128 -> 32)'), ('blocks.1.attn', 'Attention(32)', 'mamba(32)')]
>>> vit(torch.randn(1, 3, 32, 32)).shape
torch.Size([1, 1000])

In models of transformers these are `"transformer.h.*.mlp"` of GPT-2, `"model.layers.*.mlp"` and
`"model.layers.*.self_attn"` of Llama, and `"*.intermediate"` and `"*.output"`, the two halves of BERT's perceptrons,
behind `{"*.attention.*": None}`. A mixer there keeps no cache: `config.use_cache` is turned off. What is no such
structure is refused, with the reason.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from archzoo._surgery_adapters import Adapter, register_adapter
from archzoo._surgery_checks import Setting, dress, never_called, refusals, settings
from archzoo._surgery_match import TOLERANCE, Costs, Fit, fit
from archzoo._surgery_measure import Measured, measure, output_errors
from archzoo._surgery_optimizer import Regrouping, check_optimizer, regroup
from archzoo._surgery_sites import Rules, Site, find_sites, parse_rules, rule_text, unmatched_message
from archzoo._surgery_table import table
from archzoo.budget import count_parameters

__all__ = ["Adapter", "SwapReport", "Swapped", "register_adapter", "swap", "unswap"]


@dataclass(frozen=True)
class Swapped:
    """One module that was replaced.

    Attributes:
        names: All its names in the model, of which a shared module has several; "" is the model itself.
        original: What stood there, with its sizes.
        layer: The layer's name in the registry, or the name of the function that made it.
        sizes: Of the new layer, as `64 -> 32`.
        options: The layer's options that were given or chosen.
        parameters: Before and after.
        flops: Before and after, for the calibration batch; None if none was given.
        start: `"exact"`: computes what the original did, to rounding. `"approximate"`: comes near. `"fresh"`: random.
        error: Root mean square of the difference of the outputs over that of the original's, on `error_on`.
        error_on: What the error is of: `"calibration"`, or `"normal inputs"` where there is no such batch or it does
            not reach the layer.
        reason: Why a start from the original was not to be had.
    """

    names: tuple[str, ...]
    original: str
    layer: str
    sizes: str
    options: Mapping[str, Any]
    parameters: tuple[int, int]
    flops: tuple[int, int] | None = None
    start: Literal["exact", "approximate", "fresh"] = "fresh"
    error: float | None = None
    error_on: Literal["calibration", "normal inputs"] | None = None
    reason: str = ""

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.names[0]


@dataclass
class SwapReport:
    """What `swap` did; `print` shows it as a table. It keeps the originals alive, for `unswap`.

    Attributes:
        swaps: One entry for each module that was replaced, in the model's order.
        model: The model: the one that was given, unless it was itself replaced.
        parameters: The model's, before and after.
        flops: Of one forward pass on the calibration batch, before and after; None if none was given.
        unmatched: The rules that matched nothing.
        matched: What `match` chose, in words; "" where it changed nothing.
        dry_run: Whether the model was left as it is.
    """

    swaps: tuple[Swapped, ...]
    model: nn.Module = field(repr=False)
    parameters: tuple[int, int]
    flops: tuple[int, int] | None
    unmatched: tuple[str, ...]
    matched: str
    dry_run: bool
    _operation: "_Operation | None" = field(repr=False, compare=False)

    def __str__(self) -> str:
        return table(self)


class _Operation:
    """The change of a model, and its undoing."""

    def __init__(self, model: nn.Module, pairs: list[tuple[Site, nn.Module]], values: list[Setting]):
        self.model, self.pairs = model, pairs
        self.root = next((new for site, new in pairs if (None, "") in site.slots), model)
        self.settings = [(module, name, getattr(module, name), value) for module, name, value in values]
        self.modes = [new.training for _, new in pairs]
        self.regrouping: Regrouping | None = None

    def apply(self) -> None:
        for site, new in self.pairs:
            for parent, key in site.slots:
                if parent is not None:
                    parent._modules[key] = new
        for module, name, _, value in self.settings:
            setattr(module, name, value)

    def check_undo(self) -> None:
        for site, new in self.pairs:
            for parent, key in site.slots:
                if parent is not None and parent._modules.get(key) is not new:
                    raise ValueError(
                        f"report: {site.name} is no longer the layer that this swap put there; take back what came "
                        "after first"
                    )
        if self.regrouping is not None:
            self.regrouping.check_undo()

    def undo(self) -> None:
        for (site, new), mode in zip(self.pairs, self.modes, strict=True):
            for parent, key in site.slots:
                if parent is not None:
                    parent._modules[key] = site.module
            if new.training != mode:
                site.module.train(new.training)
        for module, name, before, _ in self.settings:
            setattr(module, name, before)
        if self.regrouping is not None:
            self.regrouping.undo()


def swap(
    model: nn.Module,
    rules: Rules,
    *,
    match: Literal["params", "flops"] | None = None,
    init: Literal["fresh", "from_original"] = "fresh",
    dry_run: bool = False,
    optimizer: Optimizer | None = None,
    calibration: Any = None,
    allow_unmatched: bool = False,
    **options_per_layer: Mapping[str, Any],
) -> SwapReport:
    """Replaces modules of a model by layers of the zoo, in place. Either all of it is done, or nothing.

    **Rules.** The first that matches a module wins. A rule is a glob over dotted names, in which `*` crosses dots
    (`"blocks.*.mlp.fc*"`; `""` is the model itself, which no other glob matches); a type, which matches modules of that
    very type and not of a subclass; or a function `(name, module) -> bool`. It leads to a layer's name, to `(name,
    options)`, to a function of the module that returns the new one, ready for use, or to None: what it matches stays.
    What is inside a module that is replaced goes with it.

    **Structures.** A layer of kind `linear` takes the place of `nn.Linear`, transformers' `Conv1D`, or a perceptron of
    one to three of these; of kind `conv2d` that of `nn.Conv2d`, timm's variants of it, or a perceptron of 1x1 ones; of
    kind `mixer` that of self-attention (in both directions where that has no causal mask); `capsules` that of a
    classifier's linear layer. `register_adapter` adds others. A new convolution pads as the old one does, does not
    standardise its weight, and starts from the standardised one.

    **What is kept.** Sizes, bias, device, dtype and training mode; which parameters are frozen; forward and backward
    hooks, with their handles. A module that stands at several places is replaced once, and stands at all of them again.
    `nn.TransformerEncoderLayer` is kept off its fast path, which goes past the layers in it.

    **What is refused**, because it would break in silence: weights that are tied to others'; parametrized layers
    (`remove_parametrizations` first); subclasses with a forward of their own; parts of `nn.MultiheadAttention`; hooks
    on parameters and on state dicts; what `DistributedDataParallel` has wrapped, or TorchScript has compiled; a layer
    whose weight the module around it reads by itself, unless a calibration batch shows that it is called too.

    **Counts.** With `match` the whole model keeps its parameters or its FLOPs within 1 %. Where two replaced layers
    follow each other with nothing but elementwise functions between them, as `fc1 -> act -> fc2`, the width between
    them is free: all such widths are multiplied by one factor, or by as nearly one as it takes. Else, and with
    `init="from_original"` first, one option of the layer is chosen that is a whole number and was not given; else both.

    Args:
        model: The model. Also on the meta device.
        rules: What to replace by what.
        match: Which count of the model to keep: `"params"`, `"flops"` (of the calibration batch), or None.
        init: `"fresh"`: new layers begin as they usually do. `"from_original"`: as near to the trained ones as they
            can; the report says how near, or why they are fresh.
        dry_run: Whether to report only, and to leave everything as it is.
        optimizer: Its parameter groups are put right: a new parameter goes into the group of the old one of its name;
            else, if it is a vector, into that of an old vector; else into that of the largest. What the optimizer knew
            of old ones is put aside.
        calibration: A batch: a tensor, a tuple of arguments or a dict of named ones. The model is run on it, in
            evaluation mode, before and after: for FLOPs, for the errors of starts, and to see that it still runs. Its
            own hooks see these runs.
        allow_unmatched: Whether a rule may match nothing.
        options_per_layer: Options of a layer in all rules, as `phm={"n": 4}`.

    Returns:
        What was done, which `unswap` takes back. Its `model` is the model.

    Raises:
        TypeError: If an argument is not of its type, or a layer has no such option.
        ValueError: If a layer or a choice is unknown; if a rule matches nothing; if a module cannot be replaced, says
            which and why; if the count cannot be kept, names the nearest; if the model does not run on the batch.
    """
    _check(model, match, init, calibration, optimizer)
    parsed = parse_rules(rules, options_per_layer)
    sites, unmatched = find_sites(model, parsed)
    if unmatched and not allow_unmatched:
        raise ValueError(f"rules: {unmatched_message(model, unmatched)}")
    _refuse(refusals(model, sites, tried=calibration is not None))

    modules = [site.module for site in sites]
    before = _measure(model, modules, calibration, "the model does not run on it") if calibration is not None else None
    if before is not None:
        _refuse(never_called(sites, before))
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices, enabled=dry_run):
        for site in sites:
            site.made = _made(site)
        found = _fit(model, sites, match, init, before)
        pairs, rows = _build(sites, found, init)
        if calibration is not None and init == "from_original":
            _compare(model, pairs, rows, calibration)
    operation = _Operation(model, pairs, settings(model, pairs))
    for site, new in pairs:
        dress(site, new)
    if optimizer is not None and pairs:
        operation.regrouping = regroup(optimizer, [(site.name, site.module, new) for site, new in pairs])

    parameters = count_parameters(model)
    operation.apply()
    try:
        after = None
        if calibration is not None:
            news = list(dict.fromkeys(new for _, new in pairs))
            after = _measure(operation.root, news, calibration, "the model no longer runs on it with the new layers")
            if match == "flops" and before and abs(after.flops - before.flops) > TOLERANCE * before.flops:
                raise ValueError(
                    f"match='flops': {before.flops:,} became {after.flops:,}, for more than the new layers depends on "
                    f"their widths ({found}); use match='params'"
                )
        counts = parameters, count_parameters(operation.root)
    except BaseException:
        _take_back(operation)
        raise
    if dry_run:
        _take_back(operation)
    elif operation.regrouping is not None:
        operation.regrouping.apply()
    if before is not None and after is not None:
        for (site, new), row in zip(pairs, rows, strict=True):
            row["flops"] = before.of[site.module], after.of[new]
    return SwapReport(
        tuple(Swapped(**row) for row in rows),
        model if dry_run else operation.root,
        counts,
        (before.flops, after.flops) if before and after else None,
        tuple(map(rule_text, unmatched)),
        str(found) if found.option or found.widths else "",
        dry_run,
        None if dry_run else operation,
    )


def unswap(report: SwapReport) -> nn.Module:
    """Takes a swap back: the very modules that were replaced, and an optimizer's groups and state, as they were.

    They are where they were, also if the model was moved since; their training mode is that of the layers that go.

    Args:
        report: What `swap` returned.

    Returns:
        The model.

    Raises:
        ValueError: If it was a dry run or was taken back before, or if the model or the optimizer was changed since in
            a place that the swap had changed. Nothing is changed then.
    """
    operation = report._operation
    if operation is None:
        raise ValueError("report: there is nothing to take back, after a dry run or a second time")
    operation.check_undo()
    operation.undo()
    report._operation, report.model = None, operation.model
    return operation.model


def _check(model: Any, match: Any, init: Any, calibration: Any, optimizer: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={type(model).__name__}: must be an nn.Module")
    if match not in (None, "params", "flops"):
        raise ValueError(f"match={match!r}: must be 'params', 'flops' or None")
    if init not in ("fresh", "from_original"):
        raise ValueError(f"init={init!r}: must be 'fresh' or 'from_original'")
    if match == "flops" and calibration is None:
        raise ValueError("match='flops': FLOPs are those of a batch; give one as calibration")
    if optimizer is not None:
        check_optimizer(optimizer)


def _refuse(problems: list[str]) -> None:
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{'; '.join(problems[:5])}{more}. Nothing was changed")


def _measure(model: nn.Module, modules: list[nn.Module], calibration: Any, complaint: str) -> Measured:
    try:
        return measure(model, modules, calibration)
    except Exception as error:  # of anyone's forward
        raise ValueError(f"calibration: {complaint}: {type(error).__name__}: {error}. Nothing was changed") from error


def _made(site: Site) -> nn.Module | None:
    if site.target.factory is None:
        return None
    made = site.target.factory(site.module)
    if not isinstance(made, nn.Module):
        raise TypeError(f"{site.name}: {site.target.name} returned {made!r}, which is no nn.Module")
    return made


def _fit(
    model: nn.Module, sites: list[Site], match: Literal["params", "flops"] | None, init: str, measured: Measured | None
) -> Fit:
    """What to change of the new layers; sees in any case that they can be built."""
    total = measured.flops if match == "flops" and measured else count_parameters(model)
    costs = Costs(sites, match or "params", total, measured)
    if match is None or not sites:
        costs.count(Fit())
        return Fit()
    return fit(costs, options_first=init == "from_original")


def _build(sites: list[Site], found: Fit, init: str) -> tuple[list[tuple[Site, nn.Module]], list[dict[str, Any]]]:
    """The new modules, and what the report says of each."""
    pairs: list[tuple[Site, nn.Module]] = []
    rows: list[dict[str, Any]] = []
    for site in sites:
        options, sizes = found.options(site), found.sizes(site)
        row: dict[str, Any] = {
            "names": site.names,
            "original": site.place,
            "layer": site.target.name,
            "sizes": site.adapter.describe(site.arguments | sizes) if site.adapter else "",
            "options": options,
        }
        new = None
        if init == "from_original" and site.adapter is not None:
            try:
                new = _started(site, options, sizes, row)
            except ValueError as error:
                row["reason"] = str(error)
        elif init == "from_original":
            row["reason"] = "a function made it"
        if new is None:
            new = site.build(options, sizes)
        if site.adapter is not None:
            new.train(site.module.training)
        row["parameters"] = count_parameters(site.module), count_parameters(new)
        pairs.append((site, new))
        rows.append(row)
    return pairs, rows


def _started(site: Site, options: Mapping[str, Any], sizes: Mapping[str, int], row: dict[str, Any]) -> nn.Module:
    """The new module from the trained weights; a ValueError if there is no such start."""
    if sizes:
        raise ValueError("has other sizes than the original")
    new, error = site.start(options)
    row |= {"start": "approximate" if error else "exact", "error": error, "error_on": "normal inputs"}
    return new


def _compare(
    model: nn.Module, pairs: list[tuple[Site, nn.Module]], rows: list[dict[str, Any]], calibration: Any
) -> None:
    """Puts the errors on the calibration batch into the rows of the layers that started from the original."""
    started = {
        site.module: new for (site, new), row in zip(pairs, rows, strict=True) if row.get("start", "fresh") != "fresh"
    }
    errors = output_errors(model, started, calibration)
    for (site, _), row in zip(pairs, rows, strict=True):
        if site.module in errors:
            row |= {"error": errors[site.module], "error_on": "calibration"}


def _take_back(operation: _Operation) -> None:
    """Before the optimizer was changed."""
    operation.regrouping = None
    operation.undo()
