"""The command line of the trainer: checks everything first, hands the runs to Hydra, and reports who won.

Nothing that is slow to import is imported before it is needed: `--help` and `--cfg` compose YAML, and no more.
"""

import importlib
import inspect
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from archzoo.names import suggest
from archzoo.training.config import (
    RECIPE_GROUPS,
    ConfigError,
    TrainConfig,
    asdict_plain,
    from_plain,
    run_id,
    validate,
)

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig

    from archzoo.training.progress import Progress

EXIT_FAILED, EXIT_CONFIG, EXIT_DATA, EXIT_DIVERGED = 1, 2, 3, 5
IMPORTS = "ARCHZOO_IMPORT"  # modules named by --import, for the processes of a parallel sweep
RUNS = "ARCHZOO_RUNS"  # number of runs of the sweep, for the same
STOP = "ARCHZOO_STOP"  # a file that appears when the sweep is to stop, for the same


def config_folder() -> Path:
    """The YAML files: inside the package where it is installed, beside it in a checkout."""
    package = Path(__file__).parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `train.py`; returns the exit code.

    0: all runs are done. 1: some failed. 2: the configuration is wrong. 3: data is missing. 5: some diverged. 130, 143:
    stopped by SIGINT, SIGTERM.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    began = time.monotonic()
    try:
        argv = _import_modules(argv)
        if (argv[:1] == ["--info"] and argv[1:2] == ["layers"]) or argv == ["--info=layers"]:
            return _print_layers()
        _store_schema()
        plan = make_plan(argv)
        if plan is None:  # --help, --cfg and the like
            _hydra_main(_without_sweeps(argv))
            return 0
        if len(plan.configs) > 1:
            print(f"checking {len(plan.configs)} runs, to be in {plan.configs[0].output_dir}", file=sys.stderr)
        check(plan)
    except ConfigError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return EXIT_CONFIG
    except _data_error() as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_DATA
    return _train(plan, began)


def _data_error() -> type[Exception]:
    if "archzoo.tasks.task" in sys.modules:
        from archzoo.tasks.task import DatasetError

        return DatasetError
    return ConfigError  # no task has been built, so that there can be no other error


# ---- what is to be run


@dataclass
class Plan:
    """The runs that a command line asks for."""

    argv: list[str]
    configs: list[TrainConfig]
    multirun: bool
    parallel: bool


def make_plan(argv: list[str]) -> Plan | None:
    """Composes the configuration of every run; None if none is to be run.

    Raises:
        ConfigError: If a group, key or type is wrong; it suggests the nearest.
    """
    from hydra import initialize_config_dir
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra._internal.utils import get_args_parser
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import OverrideParseException

    args = get_args_parser().parse_args(argv)
    if args.help or args.hydra_help or args.info or args.shell_completion:
        return None
    parser = OverridesParser.create()
    try:
        overrides = parser.parse_overrides(args.overrides)
    except OverrideParseException as error:
        raise ConfigError(f"{error.override}: not a setting; write KEY=VALUE, as trainer.steps=500") from error
    if args.config_dir:
        overrides += parser.parse_overrides([f"hydra.searchpath=[file://{Path(args.config_dir).absolute()}]"])
    folder = config_folder()
    with initialize_config_dir(str(folder), job_name="train", **_version_base()):
        fixed = [str(o.input_line) for o in overrides if not o.is_sweep_override()]
        _store_layers(overrides, folder)
        base = _compose(args.config_name or "train", fixed, folder)
        if args.cfg:
            return None
        _check_recipes(base.recipes, overrides)
        params = base.hydra.sweeper.get("params") or {}
        swept = parser.parse_overrides([f"{k}={v}" for k, v in params.items()]) + overrides
        _store_layers(swept, folder)
        sweeps = [o for o in swept if o.is_sweep_override()]
        multirun = bool(args.multirun or sweeps or str(base.hydra.mode) == "RunMode.MULTIRUN")
        if multirun:
            jobs: list[list[str]] = BasicSweeper.split_arguments(swept, None)[0]
            configs = _compose_jobs(args.config_name or "train", jobs, folder)
        else:
            configs = [to_config(base)]
    if sweeps and not args.multirun:
        argv = ["--multirun", *argv]
    parallel = not str(base.hydra.launcher.get("_target_", "")).endswith("BasicLauncher")
    return Plan(argv, configs, multirun, parallel)


def _without_sweeps(argv: list[str]) -> list[str]:
    """Takes the first value of every sweep: what is shown is one run's configuration."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parser = OverridesParser.create()
    shown: list[str] = []
    for argument in argv:
        override = None if argument.startswith("-") or "=" not in argument else parser.parse_override(argument)
        if override is not None and override.is_sweep_override():
            argument = f"{override.get_key_element()}={next(iter(override.sweep_string_iterator()))}"
        shown.append(argument)
    return shown


def _compose_jobs(name: str, jobs: list[list[str]], folder: Path) -> list[TrainConfig]:
    """Every job's config; jobs that differ in the seed alone are composed once."""
    composed: dict[tuple[str, ...], DictConfig] = {}
    configs: list[TrainConfig] = []
    for job in jobs:
        seed = next((line for line in job if line.startswith("seed=")), None)
        rest = tuple(line for line in job if line is not seed)
        if rest not in composed:
            composed[rest] = _compose(name, list(rest) + ([seed] if seed else []), folder)
        config = to_config(composed[rest])
        if seed is not None:
            value = seed.removeprefix("seed=")
            if not value.lstrip("-").isdigit():
                raise ConfigError(f"seed={value}: must be a whole number from 0 up, as seed=0")
            config.seed = int(value)
        configs.append(config)
    return configs


def _compose(name: str, overrides: list[str], folder: Path) -> "DictConfig":
    from hydra import compose
    from hydra.errors import ConfigCompositionException, MissingConfigException
    from omegaconf.errors import OmegaConfBaseException

    try:
        return compose(name, overrides=overrides, return_hydra_config=True)
    except MissingConfigException as error:
        raise ConfigError(_missing_group(error, folder)) from error
    except ConfigCompositionException as error:
        raise ConfigError(_bad_override(error, overrides, folder)) from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key or 'configuration'}: {str(error).splitlines()[0]}") from error


def _missing_group(error: Any, folder: Path) -> str:
    group, _, choice = str(error.missing_cfg_file).rpartition("/")
    options = list(error.options or [])
    if not group:
        return f"{choice}: there is no such configuration; {suggest(choice, [p.stem for p in folder.glob('*.yaml')])}"
    if group == "layer":
        options = sorted({*options, *_swappable_layers()})
    return f"{group}={choice}: there is no such {group}; {suggest(choice, options)}"


def _bad_override(error: Exception, overrides: list[str], folder: Path) -> str:
    text = str(error)
    if text.startswith("Could not override '"):
        key = text.split("'")[1]
        line = next((o for o in overrides if o.startswith(f"{key}=")), key)
        wrong, names = _unknown_part(key, overrides, folder)
        return f"{line}: there is no such key" + (f"; {suggest(wrong, names)}" if names else "")
    cause = error.__cause__
    while cause is not None and cause.__cause__ is not None:
        cause = cause.__cause__
    first = str(cause or error).splitlines()[0]
    line = text.splitlines()[0].removeprefix("Error merging override ").removesuffix(":")
    return f"{line}: {first}" if line != first else first


def _unknown_part(key: str, overrides: list[str], folder: Path) -> tuple[str, list[str]]:
    """The first part of a dotted key that the configuration does not have, and the keys that it has there."""
    from hydra import compose
    from omegaconf import DictConfig

    try:
        node: Any = compose("train", overrides=[o for o in overrides if not o.startswith(f"{key}=")])
    except Exception:  # another override is wrong too; the suggestion is left out
        return key, []
    names = sorted({*map(str, node), *(p.name for p in folder.iterdir() if p.is_dir())})
    for part in key.split("."):
        if not isinstance(node, DictConfig) or part not in node:
            return part, names
        node = node[part]
        names = list(map(str, node)) if isinstance(node, DictConfig) else []
    return key, []


def to_config(composed: "DictConfig") -> TrainConfig:
    """The typed configuration of a run, interpolations resolved."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    name = composed.layer.get("name")
    try:
        recipe = (composed.recipes or {}).get(name) or {}
        if recipe:
            composed = OmegaConf.merge(composed, recipe)  # type: ignore[assignment]
        plain: dict[str, Any] = {
            f.name: OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
            for f in fields(TrainConfig)
            for node in [composed[f.name]]
        }
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    return from_plain(plain | {"recipes": {}})


def _check_recipes(recipes: "DictConfig | None", overrides: "list[Override]") -> None:
    """Refuses recipes for layers that there are not, of what they may not set, or against the command line."""
    from omegaconf import OmegaConf

    if not recipes:
        return
    from archzoo.registry import list_layers

    plain: Any = OmegaConf.to_container(recipes)
    known, typed = list_layers(), {o.get_key_element().lstrip("+"): o.input_line for o in overrides}
    for layer, recipe in plain.items():
        if layer not in known:
            raise ConfigError(f"recipes.{layer}: no such layer, {suggest(layer, known)}")
        if recipe is not None and not isinstance(recipe, dict):
            raise ConfigError(
                f"recipes.{layer}={recipe}: must hold settings by group, as recipes.{layer}.optimizer.weight_decay=0"
            )
        for group, settings in (recipe or {}).items():
            if group not in RECIPE_GROUPS or not isinstance(settings, dict) or "name" in settings:
                raise ConfigError(
                    f"recipes.{layer}.{group}={settings}: a recipe holds settings of {', '.join(RECIPE_GROUPS)}, as "
                    f"recipes.{layer}.optimizer.weight_decay=0"
                )
            for key, value in settings.items():
                if (line := typed.get(f"{group}.{key}")) is not None:
                    raise ConfigError(
                        f"{line}: the recipe of layer {layer} sets {group}.{key}={value}; set "
                        f"recipes.{layer}.{group}.{key} too, or drop the recipe by recipes.{layer}=null"
                    )


def _version_base() -> dict[str, Any]:
    """Asks hydra 1.3 for its present defaults; 1.4 has them anyway, and warns of the argument."""
    import hydra

    return {"version_base": "1.3"} if hydra.__version__.startswith("1.3.") else {}


def _store_schema() -> None:
    _store(None, "schema", TrainConfig)


def _store(group: str | None, name: str, node: Any) -> None:
    """Puts a config beside the YAML files, once: hydra 1.4 warns of a second time."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    known = store.repo if group is None else store.repo.get(group, {})
    if f"{name}.yaml" not in known:
        store.store(name=name, group=group, node=node)


def _store_layers(overrides: "list[Override]", folder: Path) -> None:
    """Makes a group option of every chosen layer that has no YAML, as one from another package."""
    chosen: set[str] = set()
    for override in overrides:
        if override.get_key_element() == "layer":
            values = override.sweep_string_iterator() if override.is_sweep_override() else [override.value()]
            chosen |= {str(v) for v in values}
    missing = [c for c in chosen if not (folder / "layer" / f"{c}.yaml").exists()]
    if not missing:
        return
    from archzoo.registry import get_layer, layer_options

    for name in set(missing) & set(_swappable_layers()):
        bias = inspect.signature(get_layer(name).cls).parameters.get("bias")  # which a mixer need not have
        options = {} if bias is None else {"bias": bias.default}
        options |= {k: list(v) if isinstance(v, tuple) else v for k, v in layer_options(name).items()}
        _store("layer", name, {"name": name, **options})


def _swappable_layers() -> list[str]:
    """All that models can be made of, whose signatures their kind says."""
    from archzoo.registry import get_layer, list_layers

    return [name for name in list_layers() if get_layer(name).kind != "module"]


# ---- what is wrong with it


def check(plan: Plan) -> None:
    """Checks every run before anything is trained or written.

    Raises:
        ConfigError, DatasetError: With the key, its value and what would be right.
    """
    errors: list[str] = []
    seen: set[str] = set()
    distinct: list[TrainConfig] = []
    for config in plan.configs:
        try:
            validate(config)
        except ConfigError as error:
            errors += [line for line in str(error).splitlines() if line not in errors]
        key = json.dumps({k: v for k, v in asdict_plain(config).items() if k != "seed"}, sort_keys=True)
        if key not in seen:
            seen.add(key)
            distinct.append(config)
    if errors:
        raise ConfigError("\n".join(errors))
    for folder in {Path(config.output_dir) for config in plan.configs}:
        _check_writable(folder)

    from archzoo.training.build import build_task, choose_widths, data_dir, resolve_device, total_steps
    from archzoo.training.run import make_callbacks

    for config in distinct:
        try:
            _check_baseline(config)
            data_dir(config)
            task = build_task(config)
            match = choose_widths(config, task)
            for callback in make_callbacks(config):
                callback.prepare(config, match)
            resolve_device(config.trainer.device)
            total_steps(config, task, 1.0)
            _check_optimizer(config)
        except ConfigError as error:
            errors += [line for line in str(error).splitlines() if line not in errors]
        except ValueError as error:
            errors.append(str(error))
    if errors:
        raise ConfigError("\n".join(errors))


def _check_baseline(config: TrainConfig) -> None:
    """A label in the report is the layer's name, with what tells it from others of that layer in brackets behind it."""
    from archzoo.registry import list_layers

    baseline = config.sweep.baseline
    if baseline is not None and not set(baseline.partition(" (")[0].split("+")) <= set(list_layers()):
        raise ConfigError(f"sweep.baseline={baseline}: no such layer, {suggest(baseline, list_layers())}")


def _check_optimizer(config: TrainConfig) -> None:
    from torch import nn

    from archzoo.training.build import build_optimizer

    if config.optimizer.options or not (config_folder() / "optimizer" / f"{config.optimizer.name}.yaml").exists():
        build_optimizer(config.optimizer, nn.Linear(1, 1))


def _check_writable(folder: Path) -> None:
    """Makes the folder and a file in it, and takes both away again."""
    made: list[Path] = []
    try:
        for part in reversed([folder, *folder.parents]):
            if not part.exists():
                part.mkdir()
                made.append(part)
        probe = folder / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"output_dir={folder}: cannot be written ({error.strerror}); give a folder that can, as "
            "output_dir=outputs/mine"
        ) from error
    finally:
        for part in reversed(made):
            part.rmdir()


# ---- running it

_stop_signal: list[int] = []
_progress: "list[Progress]" = []


def should_stop() -> bool:
    """Whether a signal has asked this process, or the one that started the sweep, to stop."""
    return bool(_stop_signal) or (STOP in os.environ and os.path.exists(os.environ[STOP]))  # noqa: PTH110 - once a step


def _on_signal(number: int, frame: Any) -> None:
    if _stop_signal:  # the second one: at once
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        return
    _stop_signal.append(number)
    if STOP in os.environ:  # a launcher's processes get no signal that was sent to this one
        Path(os.environ[STOP]).touch()
    print("stopping after this step; the same command goes on from here (again to stop at once)", file=sys.stderr)


def run_job(composed: "DictConfig") -> dict[str, Any]:
    """One run of a sweep, in this process or in one of a launcher's. Returns its record."""
    for name in filter(None, os.environ.get(IMPORTS, "").split(",")):
        importlib.import_module(name)
    from archzoo.training.progress import SweepProgress
    from archzoo.training.run import execute, run_name

    config = to_config(composed)
    validate(config)
    if _main_process() and not _stop_signal:
        progress = _progress[0]
    else:
        from hydra.core.hydra_config import HydraConfig

        for signal_number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signal_number, _on_signal)
        number = int(getattr(HydraConfig.get().job, "num", 0)) + 1
        progress = SweepProgress(int(os.environ.get(RUNS, number)), bars=False, number=number)
    if should_stop():
        return {"run_id": run_id(asdict_plain(config)), "name": run_name(config), "status": "interrupted"}
    return execute(config, progress=progress, should_stop=should_stop)


def _main_process() -> bool:
    return bool(_progress)


def _hydra_main(argv: list[str]) -> None:
    import hydra

    before, sys.argv = sys.argv, [sys.argv[0], *argv]
    try:
        hydra.main(config_path=str(config_folder()), config_name="train", **_version_base())(run_job)()
    finally:
        sys.argv = before


def _train(plan: Plan, began: float) -> int:
    from archzoo.training.progress import SweepProgress

    os.environ[RUNS] = str(len(plan.configs))
    progress = SweepProgress(len(plan.configs), bars=False if plan.parallel else None)
    stop_folder = tempfile.TemporaryDirectory() if plan.parallel else None
    if stop_folder is None:
        _progress.append(progress)
    else:
        os.environ[STOP] = str(Path(stop_folder.name) / "stop")
    handlers = {n: signal.signal(n, _on_signal) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        _hydra_main(plan.argv)
    finally:
        progress.close()
        _progress.clear()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if stop_folder is not None:
            del os.environ[STOP]
            stop_folder.cleanup()
    return _report(plan, began)


def _report(plan: Plan, began: float) -> int:
    from archzoo.training.run import read_record

    root = Path(plan.configs[0].output_dir)
    folders = [root / run_id(asdict_plain(config)) for config in plan.configs]
    records = [read_record(folder) for folder in folders]
    statuses = [record["status"] if record else "missing" for record in records]
    if plan.multirun:
        _print_comparison(root)
    _print_places(root, folders, plan, statuses, time.monotonic() - began)
    if _stop_signal:
        return 128 + _stop_signal[0]
    if any(status in ("failed", "missing", "interrupted", "running") for status in statuses):
        return EXIT_FAILED
    return EXIT_DIVERGED if "diverged" in statuses else 0


def _print_comparison(root: Path) -> None:
    from archzoo.__main__ import print_table
    from archzoo.report import write_report

    print()
    print_table(root, None)
    write_report(root)


def _print_places(root: Path, folders: list[Path], plan: Plan, statuses: list[str], seconds: float) -> None:
    counts = {status: statuses.count(status) for status in dict.fromkeys(statuses)}
    print(f"\n{', '.join(f'{n} {status}' for status, n in counts.items())} in {seconds:.0f} s")
    if plan.multirun:
        print(f"report:      {root / 'report.html'}")
    else:
        print(f"run folder:  {folders[0]}")
    tracker = plan.configs[0].tracker
    if tracker.wandb == "offline":
        where = root / ("*" if plan.multirun else folders[0].name)
        print(f"in W&B:      wandb login, then: wandb sync {where}/wandb/offline-run-*")
    elif tracker.wandb == "online":
        print(f"in W&B:      project {tracker.project}, group {plan.configs[0].name}, at wandb.ai")
    else:
        print("in W&B:      not mirrored (tracker.wandb=disabled)")
    if tracker.tensorboard:
        print(f"TensorBoard: tensorboard --logdir {root}")
    if set(counts) != {"done"}:
        again = "the same command goes on" if _stop_signal else "sweep.retry_failed=true trains the others again"
        print(f"not all runs are done: {again}")


# ---- the rest


def _import_modules(argv: list[str]) -> list[str]:
    """Takes `--import MODULE` off the command line and imports it: the way for a user's own layers to be found."""
    rest: list[str] = []
    names: list[str] = []
    arguments = iter(argv)
    for argument in arguments:
        if argument == "--import":
            names.append(next(arguments, ""))
        elif argument.startswith("--import="):
            names.append(argument.removeprefix("--import="))
        else:
            rest.append(argument)
    for name in names:
        sys.path.insert(0, str(Path.cwd())) if _beside(name) else None
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ConfigError(f"--import {name}: cannot be imported ({error})") from error
    if names:
        os.environ[IMPORTS] = ",".join(names)
    return rest


def _beside(name: str) -> bool:
    return name not in sys.modules and Path(f"{name.partition('.')[0]}.py").exists()


def _print_layers() -> int:
    from archzoo.__main__ import main as archzoo

    return archzoo(["layers"])
