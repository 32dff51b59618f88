"""Random configurations, valid and broken, as words of the command line; each must train a step or be refused.

A case is a function of its seed. It begins with a small valid run and changes some settings, each to a neighbour, to a
value of another type, out of range, not a number, huge, odd or unknown, or chooses something that does not go together.
"""

import contextlib
import copy
import io
import json
import random
import re
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any
from unittest import mock

import hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser

from archzoo.registry import list_layers
from archzoo.tasks.task import DatasetError
from archzoo.training import build, composing
from archzoo.training.config import ConfigError, TrainConfig, asdict_plain
from archzoo.training.run import execute

LIMIT = 3.0
"""Seconds of CPU that a case may take, its step included."""

SHORT = ["trainer.steps=1", "trainer.epochs=null", "trainer.seconds=null", "trainer.limit_batches=1"]
SHORT += ["trainer.batch_size=4", "trainer.eval_batch_size=8", "trainer.device=cpu", "tracker=none"]
FREE = "budget.match=none"
SMALL_MLP = ["model=mlp", "model.width=8", "model.depth=1"]
SMALL_CNN = ["model=cnn", "model.width=4", "model.depth=1", "model.stem=4", "budget.to=conv2d", "task=digits"]
SMALL_DECODER = ["model=decoder", "model.width=64", "model.depth=1"]
TEXTS = [
    ["task=selective_copying", "task.length=8", "task.data=2", "task.symbols=4", "task.eval_size=8"],
    ["task=induction_heads", "task.length=8", "task.symbols=4", "task.test_lengths=[8]", "task.test_size=2"],
    ["task=associative_recall", "task.pairs=2", "task.vocab=8", "task.eval_size=8"],
]
BASES: list[tuple[list[str], str]] = [  # words, and the kind of the layer that is to be chosen; "" for none
    (["task=digits", *SMALL_MLP], "linear"),
    (["task=digits", *SMALL_MLP, FREE], "linear"),
    (["task=tabular", *SMALL_MLP], "linear"),
    (["task=functions", "task.train_size=16", "task.test_size=16", *SMALL_MLP], "linear"),
    (["task=functions", "task.train_size=16", "task.test_size=16", "model=kan", "layer=kan", FREE], ""),
    (["task=arithmetic", "task.input_size=4", "task.eval_size=8", "model=arithmetic", FREE], "linear"),
    (["task=poisson", "task.n_interior=16", "task.n_boundary=8", "task.eval_side=4", *SMALL_MLP, FREE], "linear"),
    (["task=digits", "model=vit", "model.width=16", "model.depth=1", "model.dim=8", FREE], "linear"),
    (["task=autoencoding", "task.dataset=digits", "model=autoencoder", "model.width=8", "model.latent=2"], "linear"),
    (["task=flow_matching", "task.eval_size=8", "model=linear_flow", "model.width=8", "model.depth=1", FREE], "linear"),
    (["task=digits", "model=bpu", "model.connectome=generated", "layer=bpu", FREE], ""),
    (["task=idempotent", "model=projector", "model.width=4", "model.depth=1", "budget.to=conv2d"], "conv2d"),
    (["task=style_transfer", "model=stylizer", "model.width=4", "model.depth=1", "budget.to=conv2d"], "conv2d"),
    (SMALL_CNN, "conv2d"),
    ([*SMALL_CNN, FREE], "conv2d"),
    *(([*text, *SMALL_DECODER, FREE], "mixer") for text in TEXTS),
    ([*TEXTS[0], "model=transformer", "model.width=16", "model.depth=1", "model.heads=2"], "linear"),
    ([*TEXTS[0], "model=transformer", "model.width=16", "model.depth=1", "model.heads=2", FREE], "mixer"),
    ([*TEXTS[0], "model=mamba_lm", "layer=mamba", "model.width=64", "model.depth=1", FREE], ""),
    (["task=digits", "model=timm", "model.name=test_vit", "swap={blocks.0.mlp.fc1: layer}", FREE], "linear"),
]
SLOW = ("model=timm", "model=projector", "model=stylizer")
"""Seconds a case: chosen less often."""
GROUPS = ("task", "model", "layer", "optimizer", "scheduler", "tracker", "debug")
NEEDS_FILES = ("cifar10", "fashion_mnist", "mnist", "multi_mnist", "mnist_arithmetic", "text", "chess_moves")
SLOW_TO_LOAD = ("super_resolution", "char_lm", "transformers", "chess_bpu")  # seconds, once a process

HUGE = ("1000000000", "9223372036854775807", "9223372036854775808", "1e300", "-1000000000")
ODD = ["''", "' '", "'ä 😀 ﷽'", "'../x'", "'a/b'", "'<script>alert(1)</script>'", "'[red]'", "'\x1b[31mx'", "'a\\'b'"]
ODD += ["'%s{}'", "'$HOME'", "'\u202e'", "'nan'", "'1'", "'true'", "'None'", "name", "'" + "x" * 3000 + "'", "'\\\\'"]
WRONG: dict[type, list[str]] = {
    bool: ["true", "false", "1", "0", "yes", "maybe", "null", "[]", "nan"],
    int: ["0", "1", "2", "3", "4", "7", "-1", "1.5", "true", "null", "nan", "inf", "x", "[1]", "{a: 1}", "'7'", *HUGE],
    float: ["0", "0.0", "0.5", "1", "1.0", "2.0", "-0.1", "1e-3", "1e30", "1e-30", "nan", "inf", "-inf", "true", "null"]
    + ["x", "[0.1]", "{}", *HUGE],
    str: [*ODD, "1", "1.5", "true", "null", "[]", "{}", "[x]", "nan", "auto", "none", "linear", "layer"],
    list: ["[]", "[0]", "[1]", "[1, 2]", "[0.5]", "[-1]", "[nan]", "[x]", "[[1]]", "[null]", "null", "3", "x", "{}"]
    + ["[1000000000]", "[true]", "[1,2,3,4,5,6,7,8,9]", "[{a: 1}]"],
    dict: ["{}", "null", "{x: 1}", "[]", "3", "x", "{linear: bias}", "{kan: grid_size}", "{'*': kan}", "{'': kan}"],
    type(None): ["1", "0", "2", "4", "-1", "0.5", "x", "true", "[1]", "{}", "nan", "inf", *HUGE],
}
CALLBACKS = ["regularization_warmup", "sparsity_schedule", "grid_update", "grid_refine", "sample_text"]
CALLBACKS += ["selection_stages", "symbolic_regression", "nothing"]
CALLBACK_OPTIONS = ["", "start: 0.1", "end: 2", "weight: 1, start: 0, end: 1", "every: 1", "sizes: [3, 5]", "at: [0.5]"]
CALLBACK_OPTIONS += ["stages: 2", "length: 3", "prompt: ''", "temperature: 0", "top_k: 1", "select: 0.1, prune: 0.5"]
CALLBACK_OPTIONS += ["at: 0.9", "at: nan", "samples: 5", "weight: nan, start: 0, end: 1", "every: 1.5", "x: 1"]


@dataclass(frozen=True)
class Case:
    """Words of the command line; `python train.py` with them, with an output folder of its own, is the case."""

    seed: int
    words: tuple[str, ...]


def case(seed: int) -> Case:
    """The case of that seed."""
    draw = random.Random(f"config {seed}")
    base, kind = draw.choices(BASES, [1 if set(SLOW) & set(words) else 8 for words, _ in BASES])[0]
    words = [*SHORT, *base]
    if kind:
        words.append(f"layer={draw.choice(list_layers(kind))}")
    for _ in range(draw.choices((0, 1, 2, 3, 5), (2, 8, 4, 2, 1))[0]):
        words += _change(draw, words)
    return Case(seed, tuple(words))


def _change(draw: random.Random, words: list[str]) -> list[str]:
    what = draw.random()
    if what < 0.72:
        leaves = _leaves_of(tuple(word for word in words if word.partition("=")[0] in GROUPS))
        groups = sorted({key.partition(".")[0] for key in leaves})
        group = draw.choices(groups, [3 if group in ("task", "model", "layer") else 1 for group in groups])[0]
        key = draw.choice([key for key in leaves if key.partition(".")[0] == group])
        pool = WRONG[type(leaves[key])] if draw.random() < 0.8 else draw.choice(list(WRONG.values()))
        return [f"{key}={draw.choice(pool)}"]
    if what < 0.80:  # a key that there is not
        where = draw.choice(
            ("", "task.", "model.", "layer.", "optimizer.", "trainer.", "budget.", "optimizer.options.")
        )
        key = draw.choice(
            ("steps_", "nothing", "widht", "betas", "eps", "_target_", "api_key", "grid_size", "n", "bias")
        )
        return [f"{draw.choice(('+', '', '++'))}{where}{key}={draw.choice(WRONG[draw.choice(list(WRONG))])}"]
    if what < 0.88:
        chosen = f"+callbacks.{draw.choice(CALLBACKS)}"
        return [f"{chosen}={{{draw.choice(CALLBACK_OPTIONS)}}}"]
    if what < 0.91:
        return [
            draw.choice(("optimizer.name", "scheduler.name", "layer.name", "model.name", "task.name"))
            + f"={draw.choice(('lion', 'poly', 'kan', 'mlp', 'digits', 'lamb', 'lbfgs', 'adafactor', 'muon', *ODD))}"
        ]
    group = draw.choice(GROUPS)
    options = [p.stem for p in (composing.config_folder() / group).glob("*.yaml")] + ["nothing", "''", "null", "[a,b]"]
    left_out = (*NEEDS_FILES, *SLOW_TO_LOAD, "wandb", "tensorboard", "profiler")
    return [f"{group}={draw.choice(sorted(o for o in options if o not in left_out))}"]


_composed: dict[Any, Any] = {}


def quick_compose(name: str, overrides: list[str], return_hydra_config: bool = False) -> Any:
    """`hydra.compose`, which reads the YAML files once for the same choices of groups."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    groups = tuple(
        o.input_line for o in parsed if o.get_key_element().lstrip("+~") in (*GROUPS, "trainer", "experiment")
    )
    rest = [o for o in parsed if o.input_line not in groups]
    if (groups, return_hydra_config) not in _composed:
        made = _compose(name, overrides=list(groups), return_hydra_config=return_hydra_config)
        _composed[groups, return_hydra_config] = made
    config = copy.deepcopy(_composed[groups, return_hydra_config])
    ConfigLoaderImpl._apply_overrides_to_config(rest, config)
    return config


_compose = hydra.compose
composing.store_schema()  # which `cli.main` does first
_leaves: dict[tuple[str, ...], dict[str, Any]] = {}


def _leaves_of(groups: tuple[str, ...]) -> dict[str, Any]:
    """Dotted key -> value of the configuration that these choices compose to; few if they compose to none."""
    if groups not in _leaves:
        with mock.patch.object(hydra, "compose", quick_compose):
            try:
                plan = composing.make_plan(list(groups))
                plain = asdict_plain(plan.configs[0])  # type: ignore[union-attr]
            except ConfigError:
                plain = {"name": "x", "seed": 0}
        plain.pop("output_dir", None)
        plain.pop("data_dir", None)
        _leaves[groups] = dict(_flat(plain, ""))
    return _leaves[groups]


def _flat(config: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@dataclass
class Outcome:
    """How a case ended."""

    case: Case
    kind: str
    """`"trained"`, `"diverged"`, `"refused"`, `"no data"`; anything else is a finding."""
    told: str
    """The refusal, or what went wrong."""
    seconds: float

    @property
    def found(self) -> bool:
        """Whether it is a finding."""
        return self.kind not in ("trained", "diverged", "refused", "no data") or self.seconds > LIMIT

    def __str__(self) -> str:
        words = " ".join(word if len(word) < 80 else f"{word[:77]}…" for word in self.case.words[len(SHORT) :])
        return f"{self.kind} after {self.seconds:.1f} s, seed {self.case.seed}: {words}\n    {self.told[:2000]}"


TOP = {f.name for f in fields(TrainConfig)} | {*GROUPS, "hydra", "experiment", "ARCHZOO_DATA"}
_NAMED = re.compile(r"^[+~]*(\w+)[.=:, ]")


def run(tried: Case, whole: bool = False) -> Outcome:
    """Makes the plan, checks it, and trains a step where nothing is refused.

    Args:
        tried: The case.
        whole: Whether hydra reads its files anew, as in a new process.
    """
    began = time.process_time()  # others may be at work on this machine
    root = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            kind, told = _run(tried, root, whole)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    return Outcome(tried, kind, told, time.process_time() - began)


def _run(tried: Case, root: Path, whole: bool) -> tuple[str, str]:
    argv = [*tried.words, f"output_dir={root / 'out'}"]
    try:
        with warnings.catch_warnings(), mock.patch.object(hydra, "compose", _compose if whole else quick_compose):
            warnings.simplefilter("ignore")
            plan = composing.make_plan(argv)
            assert plan is not None
            composing.check(plan)
    except ConfigError as error:
        lines = str(error).splitlines()
        known = TOP | {word.lstrip("+~").partition("=")[0] for word in tried.words}
        unnamed = [line for line in lines if not ((m := _NAMED.match(line)) and m[1] in known)]
        if list(root.iterdir()):
            return "written by a refusal", str(list(root.rglob("*")))
        return ("no key named", "\n".join(unnamed)) if unnamed or not lines else ("refused", str(error))
    except DatasetError as error:
        return "no data", str(error)
    except Exception:  # any is what is looked for
        return "another exception", traceback.format_exc(limit=-6)
    config = plan.configs[0]
    config.trainer.steps, config.trainer.epochs, config.trainer.seconds = 1, None, None
    config.trainer.limit_batches, config.trainer.workers, config.trainer.threads = 1, 0, 1
    config.trainer.compile = config.trainer.profile = False
    config.tracker.wandb, config.tracker.tensorboard, config.tracker.pictures = "disabled", False, False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            record = execute(config)
    except Exception:  # any, likewise
        return "another exception in the run", traceback.format_exc(limit=-6)
    kind = {"done": "trained", "diverged": "diverged"}.get(record["status"], f"run {record['status']}")
    if kind.startswith("run "):
        log = root / "out" / record["run_id"] / "log.txt"
        return kind, f"{record['error']}\n{log.read_text()[-1500:] if log.exists() else ''}"
    return kind, ""


@dataclass
class Tally:
    """What many cases came to."""

    counts: Counter[str] = field(default_factory=Counter)
    findings: list[Outcome] = field(default_factory=list)
    slowest: float = 0.0

    def add(self, outcome: Outcome) -> None:
        """Counts one."""
        self.counts[outcome.kind] += 1
        self.slowest = max(self.slowest, outcome.seconds)
        if outcome.found:
            self.findings.append(outcome)


def fuzz(seeds: range, whole_every: int = 8, told: Callable[[Outcome], None] = lambda outcome: None) -> Tally:
    """Runs the cases of these seeds; every so manieth reads hydra's files anew."""
    tally = Tally()
    run(case(seeds.start))  # what the first one imports is not its own time
    for seed in seeds:
        outcome = run(case(seed), whole=seed % whole_every == 0)
        if outcome.seconds > LIMIT:  # was it imports, as of torch's compiler, that the first one pays for?
            build._chosen.clear()
            build._task.cache_clear()
            outcome = run(case(seed), whole=seed % whole_every == 0)
        tally.add(outcome)
        told(outcome)
    return tally


def main() -> None:
    """`python -m tests.fuzz.configs FIRST LAST` prints a JSON line a finding of these seeds, and one of the counts."""

    def told(outcome: Outcome) -> None:
        if outcome.found:
            print(json.dumps({"finding": str(outcome)}), flush=True)

    tally = fuzz(range(int(sys.argv[1]), int(sys.argv[2])), told=told)
    print(json.dumps({"counts": tally.counts, "slowest": tally.slowest}))


if __name__ == "__main__":
    main()
