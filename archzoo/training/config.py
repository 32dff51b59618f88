"""The trainer's configuration: dataclass schemas behind every Hydra group, and the checks of their values.

Nothing here imports torch: `python train.py --help` composes and prints these in well under two seconds.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from archzoo.arguments import INFINITE, described, fits
from archzoo.names import suggest


class ConfigError(ValueError):
    """A configuration that cannot run. Every line names a key, its value and what would be right."""


@dataclass
class OptimizerConfig:
    """An optimizer of `timm.optim` by name; `options` go to it as they are (betas, eps, …)."""

    name: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.0
    momentum: float = 0.9
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class SchedulerConfig:
    """A learning-rate schedule of `timm.scheduler`. Lengths are fractions of the training budget."""

    name: str = "cosine"
    warmup: float = 0.0
    min_lr: float = 0.0
    decay_rate: float = 0.1
    decay_every: float = 0.333
    milestones: list[float] = field(default_factory=lambda: [0.5, 0.75])


@dataclass
class TrainerConfig:
    """How long and how a run is trained. Exactly one of `steps`, `epochs` and `seconds` is set."""

    steps: int | None = None
    epochs: float | None = None
    seconds: float | None = None
    batch_size: Any = 64
    """A number, or `auto`: the largest that memory allows."""
    accumulate: int = 1
    checkpoint_activations: bool = False
    strategy: str = "ddp"
    rank_timeout: float = 120.0
    max_bad_steps: int = 10
    clip_grad: float | None = None
    precision: str = "float32"
    compile: bool = False
    ema_decay: float | None = None
    eval_every: int | None = None
    eval_batch_size: int = 1024
    log_every: int = 20
    checkpoint_every: int | None = None
    keep_checkpoints: int = 2
    on_save_error: str = "warn"
    device: str = "auto"
    threads: int = 1
    workers: int = 0
    deterministic: bool = False
    limit_batches: int | None = None
    overfit_batches: int | None = None
    detect_anomaly: bool = False
    profile: bool = False


@dataclass
class BudgetConfig:
    """Which count every contestant shares with the reference, and how closely."""

    match: str = "params"
    to: Any = "linear"
    tolerance: float = 0.01
    unreachable: str = "error"
    vary: dict[str, Any] = field(default_factory=dict)
    """Layer -> its whole-number option that is searched, with the widths as they are, in the place of the widths."""


@dataclass
class TrackerConfig:
    """Mirrors of the local record, Weights & Biases and TensorBoard, and what is drawn for it."""

    wandb: str = "offline"
    project: str = "archzoo"
    entity: str | None = None
    tags: list[str] = field(default_factory=list)
    tensorboard: bool = False
    pictures: bool = True
    """Whether tasks and models draw what they have to show, at the end of a run."""


@dataclass
class SweepConfig:
    """How the runs of a comparison are treated."""

    retry_failed: bool = False
    tune: list[str] = field(default_factory=list)
    """Config keys, as `optimizer.lr`, of which the report shows every contestant at its best value."""
    baseline: str | None = None
    """What the report compares the others with: a contestant's label there, or a layer. None: `linear` where it takes
    part, else the layer of the budget."""


@dataclass
class TrainConfig:
    """A run. `task`, `model` and `layer` hold a registry `name` and the options of what it names."""

    name: str = "run"
    output_dir: str = "outputs/run"
    data_dir: str | None = None
    seed: int = 0
    task: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    layer: dict[str, Any] = field(default_factory=dict)
    swap: Any = None  # a dict, which Hydra would let nothing new into
    """Glob over the names of modules of another library's model -> what takes their place: `layer`, the contestant;
    another layer's name, or `{name: kan, grid_size: 8}`; or null: they stay."""
    swap_init: str = "fresh"
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    callbacks: dict[str, Any] = field(default_factory=dict)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    recipes: dict[str, Any] = field(default_factory=dict)
    """Layer -> what of the configuration is set otherwise for it, as `{ngpt: {scheduler: {warmup: 0.0}}}`. Only the
    command line knows of them: the configuration of a run is that with its layer's recipe in it, and has none."""


_PARTS: dict[str, type] = {
    "optimizer": OptimizerConfig,
    "scheduler": SchedulerConfig,
    "trainer": TrainerConfig,
    "budget": BudgetConfig,
    "tracker": TrackerConfig,
    "sweep": SweepConfig,
}

RECIPE_GROUPS = ("layer", "optimizer", "scheduler", "trainer", "model", "callbacks")
"""What a recipe may set: a layer's options, how it is trained and what is around it, never the task or the budget."""
MOST_PROCESSES = 1024
"""Threads or loader processes of a run; more is a slip, and would bring the machine down."""
STRATEGIES = ("ddp", "fsdp")
AUTO = "auto"
"""The batch size that is found out."""
PRECISIONS = ("float32", "float64", "bfloat16", "float16")
SCHEDULERS = ("none", "cosine", "step", "multistep", "poly")
# What does not change the numbers of a run, and so is not part of its identity.
NOT_IDENTITY = {
    "": ("name", "output_dir", "data_dir", "tracker", "sweep"),
    "trainer": (
        *("device", "threads", "workers", "log_every", "checkpoint_every", "keep_checkpoints", "on_save_error"),
        *("strategy", "rank_timeout", "max_bad_steps", "checkpoint_activations", "profile"),
    ),
}


def asdict_plain(config: TrainConfig) -> dict[str, Any]:
    """The config as plain dictionaries, as it is recorded."""
    plain = asdict(config)
    del plain["recipes"]
    # Younger than their neighbours: without them, a run keeps the id that it has always had.
    if not config.budget.vary:
        del plain["budget"]["vary"]
    if not config.swap:
        del plain["swap"]
    if config.swap_init == "fresh":
        del plain["swap_init"]
    return plain


def from_plain(plain: dict[str, Any]) -> TrainConfig:
    """The inverse of `asdict_plain`.

    Raises:
        ConfigError: If a key is unknown or a value of another type, as in a record from elsewhere.
    """
    errors = list(_type_errors(TrainConfig, plain, ""))
    if errors:
        raise ConfigError("\n".join(errors))
    return TrainConfig(**{key: _PARTS[key](**value) if key in _PARTS else value for key, value in plain.items()})


def _type_errors(schema: type, plain: Any, prefix: str) -> Iterator[str]:
    if not isinstance(plain, Mapping):
        yield f"{prefix.rstrip('.') or 'configuration'}={plain}: must be a mapping of keys to values"
        return
    known = {part.name: part.type for part in fields(schema)}
    for key, value in plain.items():
        if key not in known:
            yield f"{prefix}{key}: there is no such key; {suggest(str(key), sorted(known))}"
        elif key in _PARTS and not prefix:
            yield from _type_errors(_PARTS[key], value, f"{key}.")
        elif not fits(value, known[key], INFINITE):  # what is infinite, `validate` refuses with what would be right
            yield f"{prefix}{key}={value}: must be {described(known[key])}"


CONTESTANT = "layer"
"""In `swap`, the contestant."""
USUAL = ("linear", "conv2d")
"""Layers that another library's models are made of."""


def model_key(config: TrainConfig) -> str:
    """The name in our registry of what builds the model: another library's model has a name of its own besides."""
    return str(config.model.get("library", config.model["name"]))


def swapped_layers(config: TrainConfig) -> list[str]:
    """Names of the layers that are swapped in, each once."""
    chosen = [choice for choice in (config.swap or {}).values() if choice]
    named = [choice["name"] if isinstance(choice, dict) else choice for choice in chosen]
    return list(dict.fromkeys(config.layer["name"] if name == CONTESTANT else str(name) for name in named))


def contestant(config: TrainConfig) -> str:
    """What the run is a run of: its layer, or the layers that are swapped in."""
    return "+".join(swapped_layers(config)) or str(config.layer["name"])


def identity(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a resolved config that decides a run's result: no paths, logging or devices."""
    kept = {key: value for key, value in config.items() if key not in NOT_IDENTITY[""]}
    kept["trainer"] = {key: value for key, value in config["trainer"].items() if key not in NOT_IDENTITY["trainer"]}
    return kept


def run_id(config: dict[str, Any]) -> str:
    """Ten hexadecimal digits that are the same for the same `identity`, on every machine."""
    text = json.dumps(identity(config), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def validate(config: TrainConfig) -> None:
    """Checks every value that can be checked without building anything.

    Raises:
        ConfigError: With one line for each wrong value.
    """
    errors = list(_errors(config))
    if errors:
        raise ConfigError("\n".join(errors))


def _errors(config: TrainConfig) -> Iterator[str]:
    def number(key: str, value: float | None, low: float, right: str, strict: bool = False) -> Iterator[str]:
        # No infinity, no NaN, no int that is no float: nothing that is counted or measured here comes near 1e100.
        if value is not None and not ((value > low if strict else value >= low) and value <= 1e100):
            yield f"{key}={value if isinstance(value, int) else format(value, 'g')}: must be {right}"

    def choice(key: str, value: Any, choices: tuple[str, ...]) -> Iterator[str]:
        if value not in choices:
            yield f"{key}={value}: must be one of {', '.join(choices)}; {suggest(str(value), list(choices))}"

    for group in ("task", "model", "layer"):
        if not isinstance(getattr(config, group).get("name"), str):
            yield f"{group}.name: missing; choose a {group}, as {group}={_EXAMPLES[group]}"
            return
    if not re.fullmatch(r"[^\W.][^/]{0,99}", config.name) or not config.name.isprintable():
        yield f"name={config.name[:100]!r}: must be a word without slashes, of at most 100 characters, as name=digits"
    yield from number("seed", config.seed, 0, "a whole number from 0 up, as seed=0")

    o, s, t, b = config.optimizer, config.scheduler, config.trainer, config.budget
    yield from number("optimizer.lr", o.lr, 0, "a positive number, as optimizer.lr=1e-3", strict=True)
    yield from number("optimizer.weight_decay", o.weight_decay, 0, "0 or more, as optimizer.weight_decay=0.01")
    yield from number("optimizer.momentum", o.momentum, 0, "from 0 to less than 1, as optimizer.momentum=0.9")
    if o.momentum >= 1:
        yield f"optimizer.momentum={o.momentum:g}: must be from 0 to less than 1, as optimizer.momentum=0.9"

    yield from optimizer_errors(config)
    yield from choice("swap_init", config.swap_init, ("fresh", "from_original"))
    yield from swap_errors(config)
    if isinstance(seeds := config.task.get("seeds"), int):
        yield from stacking_errors(config, seeds)

    yield from choice("scheduler.name", s.name, SCHEDULERS)
    yield from number("scheduler.min_lr", s.min_lr, 0, "0 or more, as scheduler.min_lr=1e-5")
    yield from number("scheduler.decay_rate", s.decay_rate, 0, "positive, as scheduler.decay_rate=0.1", strict=True)
    for key, value in (
        ("warmup", s.warmup),
        ("decay_every", s.decay_every),
        *(("milestones", m) for m in s.milestones),
    ):
        if not 0 <= value <= 1 or (key == "decay_every" and value == 0):
            yield f"scheduler.{key}={value:g}: must be a fraction of the budget between 0 and 1, as scheduler.{key}=0.1"

    lengths = {key: getattr(t, key) for key in ("steps", "epochs", "seconds") if getattr(t, key) is not None}
    if len(lengths) != 1:
        got = ", ".join(f"trainer.{key}={value:g}" for key, value in lengths.items()) or "none of them"
        drop = " ".join(f"trainer.{key}=null" for key in list(lengths)[1:]) or "trainer.epochs=20"
        yield f"trainer.steps, trainer.epochs, trainer.seconds: exactly one must be set, got {got}; add {drop}"
    for key, value in lengths.items():
        yield from number(f"trainer.{key}", value, 0, f"positive, as trainer.{key}=100", strict=True)
    if t.batch_size != AUTO:
        if isinstance(t.batch_size, bool) or not isinstance(t.batch_size, int):
            yield f"trainer.batch_size={t.batch_size}: must be 1 or more, as trainer.batch_size=64, or auto"
            return
        yield from number("trainer.batch_size", t.batch_size, 1, "1 or more, as trainer.batch_size=64, or auto")
    for key in ("eval_batch_size", "accumulate", "log_every", "threads", "keep_checkpoints"):
        yield from number(f"trainer.{key}", getattr(t, key), 1, f"1 or more, as trainer.{key}=1")
    for key in ("eval_every", "checkpoint_every", "limit_batches", "overfit_batches"):
        yield from number(f"trainer.{key}", getattr(t, key), 1, f"1 or more, or null, as trainer.{key}=100")
    yield from choice("trainer.strategy", t.strategy, STRATEGIES)
    yield from number("trainer.max_bad_steps", t.max_bad_steps, 0, "0 or more, as trainer.max_bad_steps=10")
    yield from number("trainer.rank_timeout", t.rank_timeout, 0, "seconds, as trainer.rank_timeout=120", strict=True)
    yield from number("trainer.workers", t.workers, 0, "0 or more, as trainer.workers=2")
    yield from number("trainer.clip_grad", t.clip_grad, 0, "positive, or null, as trainer.clip_grad=1.0", strict=True)
    yield from choice("trainer.precision", t.precision, PRECISIONS)
    yield from choice("trainer.on_save_error", t.on_save_error, ("warn", "stop"))
    if t.ema_decay is not None and not 0 < t.ema_decay < 1:
        yield f"trainer.ema_decay={t.ema_decay:g}: must be between 0 and 1, or null, as trainer.ema_decay=0.999"
    for key, value in (("threads", t.threads), ("workers", t.workers)):
        if value > MOST_PROCESSES:
            yield f"trainer.{key}={value}: must be at most {MOST_PROCESSES}, as trainer.{key}=2"
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", t.device):
        yield f"trainer.device={t.device}: must be auto, cpu, cuda or cuda:0"

    yield from choice("budget.match", b.match, ("params", "flops", "none"))
    yield from choice("budget.unreachable", b.unreachable, ("error", "nearest"))
    yield from number("budget.tolerance", b.tolerance, 0, "a fraction, as budget.tolerance=0.01")
    for layer, option in b.vary.items():
        if not isinstance(option, str):
            yield f"budget.vary.{layer}={option}: must be the name of an option, as +budget.vary.kan=grid_size"
    if isinstance(b.to, bool) or not isinstance(b.to, str | int | float):
        yield f"budget.to={b.to}: must be a layer's name or a count, as budget.to=linear or budget.to=100000"
    elif not isinstance(b.to, str):
        yield from number("budget.to", b.to, 0, "a layer's name or a positive count, as budget.to=1e5", strict=True)

    yield from choice("tracker.wandb", config.tracker.wandb, ("offline", "online", "disabled"))
    if not config.tracker.project:
        yield "tracker.project: must not be empty, as tracker.project=archzoo"
    yield from tuning_errors(config)


def tuning_errors(config: TrainConfig) -> Iterator[str]:
    """Keys of `sweep.tune` that are not there, or that no value of can be chosen: one line each."""
    plain = asdict_plain(config)
    deciding = set(_leaves(identity(plain)))
    known = sorted(key for key in deciding - {"seed", "layer.name"} if not key.startswith("task."))
    for key in config.sweep.tune:
        if key in known:
            continue
        if key in deciding or key in _leaves(plain):
            yield (
                f"sweep.tune={key}: must be a setting that decides how a run ends and is not what is compared (seed, "
                "task, layer.name), as sweep.tune=[optimizer.lr]"
            )
            continue
        inside = [name for name in known if name.startswith(f"{key}.")]
        named = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
        problem = "is a group of keys" if inside else "there is no such key"
        yield f"sweep.tune={key}: {problem}; {suggest(key, inside or named or known)}"


def _leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted keys of a nested configuration."""
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def optimizer_errors(config: TrainConfig) -> Iterator[str]:
    """Settings that L-BFGS has no place for: one line each, none for another optimizer.

    Its line search compares values of one and the same loss, so that the gradients must be exactly those of the loss.
    """
    o, t = config.optimizer, config.trainer
    if o.name != "lbfgs":
        return
    if o.weight_decay:
        yield f"optimizer.weight_decay={o.weight_decay:g}: optimizer lbfgs has none; set optimizer.weight_decay=0"
    if t.clip_grad is not None:
        yield f"trainer.clip_grad={t.clip_grad:g}: optimizer lbfgs searches its step length; set trainer.clip_grad=null"
    if t.accumulate > 1:
        yield (
            f"trainer.accumulate={t.accumulate}: optimizer lbfgs evaluates one batch many times a step; set "
            f"trainer.accumulate=1 trainer.batch_size={AUTO if t.batch_size == AUTO else t.batch_size * t.accumulate}"
        )
    if t.precision == "float16":
        yield (
            "trainer.precision=float16: its loss scaling and optimizer lbfgs do not go together; set "
            "trainer.precision=float64, float32 or bfloat16"
        )


def swap_errors(config: TrainConfig) -> Iterator[str]:
    """Settings that do not go with another library's model, or with our own: one line each."""
    example = 'swap="{blocks.*.mlp.fc*: kan}"'
    rules = {} if config.swap is None else config.swap
    if not isinstance(rules, dict):
        yield f"swap={rules}: must be globs over names of modules and layers, as {example}"
        return
    for rule, choice in rules.items():
        named = isinstance(choice, dict) and isinstance(choice.get("name"), str)
        if not (choice is None or named or (isinstance(choice, str) and choice)):
            yield f"swap.{rule}={choice}: must be a layer's name, as {example}, or {{name: kan, grid_size: 8}}, or null"
            return
    if "library" not in config.model:
        own = f"model {config.model['name']} is made of the contestant itself"
        if rules:
            yield f"swap={rules}: {own}, layer={config.layer['name']}; leave it out, or choose model=timm"
        elif config.swap_init != "fresh":
            yield f"swap_init={config.swap_init}: {own}, and nothing is swapped; leave it out"
        return
    layer, budget, model = config.layer["name"], config.budget, f"model {config.model['name']}"
    if config.task.get("seeds", 1) != 1:
        yield f"task.seeds={config.task['seeds']}: {model} is trained with one seed at a time; set task.seeds=1"
    if layer not in USUAL and CONTESTANT not in rules.values():
        yield f'layer={layer}: {model} has no place for it; say where, as swap="{{blocks.*.mlp.fc*: layer}}"'
    if budget.match != "none":
        itself = f"{model} is matched to itself, before the swap, within 1 %"
        for key, value, usual in (
            ("to", budget.to, USUAL),
            ("tolerance", budget.tolerance, (0.01,)),
            ("unreachable", budget.unreachable, ("error",)),
            ("vary", budget.vary, ({},)),
        ):
            if value not in usual:
                yield f"budget.{key}={value}: {itself}; leave it out, or set budget.match=none"


# Each changes a parameter by its own gradients alone.
ELEMENTWISE = ("adadelta", "adagrad", "adam", "adamax", "adamw", "lion", "momentum", "nadam", "radam", "rmsprop", "sgd")
RESTRUCTURING = ("grid_refine", "grid_update", "selection_stages", "symbolic_regression")


def process_errors(config: TrainConfig, processes: int, examples: int | None = None) -> Iterator[str]:
    """Settings that do not go with several processes, or with a model that is sharded over them: one line each.

    Args:
        config: The run's.
        processes: How many train the model; 0 outside a process group.
        examples: Of the smallest split.
    """
    t = config.trainer
    if t.batch_size != AUTO and t.batch_size < processes:
        yield (
            f"trainer.batch_size={t.batch_size}: is of all {processes} processes together, and each needs a part; set "
            f"trainer.batch_size={processes} or more"
        )
    if examples is not None and examples < processes:
        yield f"task={config.task['name']}: a split of {examples} examples is too small for {processes} processes"
    if t.strategy != "fsdp":
        return
    if not processes:
        yield (
            "trainer.strategy=fsdp: spreads the model over the processes that torchrun starts, and this is a single "
            "one; start it as torchrun --nproc-per-node=2 train.py, or set trainer.strategy=ddp"
        )
    small = "the model is small, and whole in every process; set trainer.strategy=ddp"
    if config.optimizer.name == "lbfgs":
        yield "optimizer.name=lbfgs: remembers many times as much as all parameters; set trainer.strategy=ddp"
    if config.task.get("seeds", 1) != 1:
        yield f"task.seeds={config.task['seeds']}: {small}"
    if "symbolic_regression" in config.callbacks:
        yield f"callbacks.symbolic_regression: {small}"


def stacking_errors(config: TrainConfig, seeds: int) -> Iterator[str]:
    """Settings that would mix several seeds that are trained as one model: one line each, none for one seed.

    Each seed must be trained as if it were alone.
    """
    if seeds <= 1:
        return
    o, t, stacked = config.optimizer, config.trainer, f"task.seeds={seeds} trains the seeds side by side, and"
    if o.name not in ELEMENTWISE:
        yield (
            f"optimizer.name={o.name}: {stacked} this optimizer may look at several parameters at once, and so at "
            f"other seeds'; use one of {', '.join(ELEMENTWISE)}, or task.seeds=1"
        )
    if t.clip_grad is not None:
        yield (
            f"trainer.clip_grad={t.clip_grad:g}: {stacked} the norm would be that of all seeds' gradients; set "
            "trainer.clip_grad=null, or task.seeds=1"
        )
    if t.precision == "float16":
        yield (
            f"trainer.precision=float16: {stacked} the loss scaling would leave out a step of all seeds for one; set "
            "trainer.precision=float32, bfloat16 or float64, or task.seeds=1"
        )
    for name in sorted(config.callbacks.keys() & set(RESTRUCTURING)):
        yield f"callbacks.{name}: {stacked} it changes layers one by one; leave it out, or set task.seeds=1"


_EXAMPLES = {"task": "digits", "model": "mlp", "layer": "kan"}
