"""The command line of the trainer: checks everything first, hands the runs to Hydra, and reports who won.

Nothing that is slow to import is imported before it is needed: `--help` and `--cfg` compose YAML, and no more.
"""

import contextlib
import importlib
import inspect
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from archzoo.names import suggest, visible
from archzoo.training.config import (
    RECIPE_GROUPS,
    ConfigError,
    TrainConfig,
    asdict_plain,
    from_plain,
    process_errors,
    run_id,
    validate,
)
from archzoo.training.untrusted import (
    check_folders,
    check_hydra,
    check_launching,
    check_primary,
    check_sweep,
    check_values,
    hide_secret,
)
from archzoo.training.writing import guarded_streams, say

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig

    from archzoo.training.progress import Progress, SweepProgress

EXIT_FAILED, EXIT_CONFIG, EXIT_DATA, EXIT_CHECKPOINT, EXIT_DIVERGED = 1, 2, 3, 4, 5
PROBE_BYTES = 1 << 16  # a disk with less room takes no record of a run
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
UNFINISHED = ("failed", "missing", "interrupted", "running")
# What a job of a launcher, in another process or on another host, finds in its environment.
IMPORTS = "ARCHZOO_IMPORT"  # modules named by --import
RUNS = "ARCHZOO_RUNS"  # number of runs of the sweep
STOP = "ARCHZOO_STOP"  # a file that appears when the sweep is to stop
LEFT_OUT = "ARCHZOO_LEFT_OUT"  # runs that are not to be trained now
LOOK_EVERY = 1.0  # seconds between looks for that file, which may be on a network


def config_folder() -> Path:
    """The YAML files: inside the package where it is installed, beside it in a checkout."""
    package = Path(__file__).parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `train.py`; returns the exit code.

    0: all runs are done. 1: some failed. 2: the configuration is wrong. 3: data is missing. 4: checkpoints could not be
    written or read. 5: some diverged. 130: stopped by SIGINT. 143: by SIGTERM, SIGUSR1 or SIGHUP.
    """
    with guarded_streams():
        try:
            return _main(argv)
        except KeyboardInterrupt:  # where nothing is trained yet, or any more
            return 128 + signal.SIGINT


def _main(argv: Sequence[str] | None) -> int:
    began = time.monotonic()
    plan = prepare(list(sys.argv[1:] if argv is None else argv))
    if isinstance(plan, int):
        return plan
    from archzoo.training import distributed

    if distributed.launched():
        return _train_together(plan, began)
    _run_all(plan)
    return _report(plan, began)


def _say(line: str) -> None:
    """A line on stderr, once where several processes on this machine would say the same."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(visible(line), file=sys.stderr)


def prepare(argv: list[str]) -> "Plan | int":
    """The runs of a command line, checked; an exit code where what is wrong with it, or what it asks for, was shown."""
    try:
        _check_text(argv)
        argv = _import_modules(argv)
        if (argv[:1] == ["--info"] and argv[1:2] == ["layers"]) or argv == ["--info=layers"]:
            return _print_layers()
        _store_schema()
        plan = make_plan(argv)
        if plan is None:  # --help, --cfg and the like
            _hydra_main(_without_sweeps(argv))
            return 0
        if len(plan.configs) > 1:
            _say(f"checking {len(plan.configs)} runs, to be in {plan.configs[0].output_dir}")
        check(plan)
    except ConfigError as error:
        for line in str(error).splitlines():
            _say(f"error: {line}")
        return EXIT_CONFIG
    except _data_error() as error:
        _say(f"error: {error}")
        return EXIT_DATA
    return plan


def _check_text(argv: list[str]) -> None:
    for argument in argv:
        if not argument.isascii() and any("\ud800" <= character <= "\udfff" for character in argument):
            encoding = sys.getfilesystemencoding()
            raise ConfigError(f"{argument!a}: not text in this locale's encoding, {encoding}; set PYTHONUTF8=1")


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
    launcher: str = "BasicLauncher"
    """The launcher's class, dotted."""
    jobs: list[list[str]] = field(default_factory=list)
    """What a sweep sets in each run: KEY=VALUE, in the order of the configs."""

    @property
    def parallel(self) -> bool:
        """Whether the runs are trained in other processes."""
        return not self.launcher.endswith("BasicLauncher")

    def folders(self) -> list[Path]:
        """The runs' folders."""
        return [Path(config.output_dir) / run_id(asdict_plain(config)) for config in self.configs]


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

    from archzoo.training.launching import check_installed

    args = get_args_parser().parse_args(argv)
    for flag in ("config_path", "experimental_rerun"):
        if value := getattr(args, flag, None):
            raise ConfigError(
                f"--{flag.replace('_', '-')} {value}: would run what has not been checked; give --config-dir with a "
                "folder of more files, and settings as KEY=VALUE"
            )
    only_shown = bool(args.help or args.hydra_help or args.info or args.shell_completion)
    borrowed = bool(args.config_dir or args.config_name or any("searchpath" in o for o in args.overrides))
    if only_shown and not borrowed:
        return None
    parser = OverridesParser.create()
    try:
        overrides = parser.parse_overrides(args.overrides)
    except OverrideParseException as error:
        line = hide_secret(str(error.override))
        raise ConfigError(f"{line}: not a setting; write KEY=VALUE, as trainer.steps=500") from error
    typed = {o.get_key_element().lstrip("+~") for o in overrides}
    for group in ("task", "model", "layer", "optimizer", "scheduler", "trainer", "tracker", "experiment", "debug"):
        for o in overrides:
            if o.get_key_element() == group and not o.is_sweep_override() and not isinstance(o.value(), str):
                raise ConfigError(f"{o.input_line}: must be the name of one {group}; leave it out for the usual one")
    if args.config_dir:
        _check_borrowed_primary(args.config_name, Path(args.config_dir))
        overrides += parser.parse_overrides([f"hydra.searchpath=[file://{Path(args.config_dir).absolute()}]"])
    folder = config_folder()
    with initialize_config_dir(str(folder), job_name="train", **_version_base()):
        fixed = [str(o.input_line) for o in overrides if not o.is_sweep_override()]
        _store_layers(overrides, folder)
        base = _compose(args.config_name or "train", fixed, folder)
        if borrowed:
            told = [line for line in fixed if line.lstrip("+~").startswith("hydra") and "searchpath" not in line]
            check_hydra(_unresolved(base.hydra), _unresolved(_compose("train", told, folder).hydra))
        check_launching(_unresolved(base.hydra))
        if args.cfg or only_shown:
            return None
        _check_recipes(base.recipes, overrides)
        params = _unresolved(base.hydra.sweeper).get("params") or {}
        listed = parser.parse_overrides([f"{k}={v}" for k, v in params.items()])
        check_sweep([o.get_key_element() for o in listed])
        swept = listed + overrides
        _store_layers(swept, folder)
        sweeps = [o for o in swept if o.is_sweep_override()]
        multirun = bool(args.multirun or sweeps or str(base.hydra.mode) == "RunMode.MULTIRUN")
        if multirun:
            jobs = BasicSweeper.split_arguments(swept, None)[0]
            configs = _compose_jobs(args.config_name or "train", jobs, folder)
        else:
            jobs, configs = [], [to_config(base)]
    for config in configs:
        folders = {"output_dir": config.output_dir, "data_dir": config.data_dir}
        check_folders({key: value for key, value in folders.items() if key not in typed})
    if sweeps and not args.multirun:
        argv = ["--multirun", *argv]
    launcher = str(base.hydra.launcher.get("_target_", ""))
    if launcher.endswith(".RayLauncher"):
        check_installed("ray")
    return Plan(argv, configs, multirun, launcher, jobs)


def _unresolved(node: "DictConfig") -> dict[str, Any]:
    from omegaconf import OmegaConf

    plain: Any = OmegaConf.to_container(node, resolve=False)
    return plain


def _check_borrowed_primary(name: str | None, folder: Path) -> None:
    """Checks the file that is composed in the place of train.yaml, for hydra fetches more from where it says."""
    from hydra._internal.core_plugins.file_config_source import FileConfigSource
    from omegaconf import DictConfig

    source = FileConfigSource("--config-dir", str(folder.absolute()))
    if name is None or FileConfigSource("main", str(config_folder())).is_config(name) or not source.is_config(name):
        return
    try:
        config: Any = source.load_config(name).config
    except Exception as error:  # a file of anyone's
        raise ConfigError(f"--config-name {name}: cannot be read ({_first_line(error)})") from error
    if not isinstance(config, DictConfig):
        raise ConfigError(f"--config-name {name}: holds a list; a configuration is a mapping of keys to values")
    check_primary(f"--config-name {name}", _unresolved(config))


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
    from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        return compose(name, overrides=overrides, return_hydra_config=True)
    except MissingConfigException as error:
        raise ConfigError(_missing_group(error, folder)) from error
    except ConfigCompositionException as error:
        raise ConfigError(_bad_override(error, overrides, folder)) from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key or 'configuration'}: {_first_line(error)}") from error
    except (
        HydraException,
        YAMLError,
        OSError,
        ValueError,
        TypeError,
        RecursionError,
    ) as error:  # of a file of anyone's
        raise ConfigError(f"configuration: cannot be composed ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _missing_group(error: Any, folder: Path) -> str:
    from archzoo.training.launching import check_installed

    group, _, choice = str(error.missing_cfg_file).rpartition("/")
    options = list(error.options or [])
    if group == "hydra/launcher":
        check_installed(choice)
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
        return f"{hide_secret(line)}: there is no such key" + (f"; {suggest(wrong, names)}" if names else "")
    if "An item is already at '" in text:
        key = text.split("'")[1]
        line = next((o for o in overrides if o.startswith(f"+{key}=")), key)
        return f"{hide_secret(line)}: is there already; write {key}=VALUE, without the plus"
    cause = error.__cause__
    while cause is not None and cause.__cause__ is not None:
        cause = cause.__cause__
    first = str(cause or error).splitlines()[0]
    line = text.splitlines()[0].removeprefix("Error merging override ").removesuffix(":")
    return f"{hide_secret(line)}: {first}" if line != first else first


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

    check_values({key: value for key, value in _unresolved(composed).items() if key != "hydra"})
    name = composed.layer.get("name")
    try:
        recipe = (isinstance(name, str) and (composed.recipes or {}).get(name)) or {}
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
    from archzoo.training.launching import register_ray

    _store(None, "schema", TrainConfig)
    register_ray()


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

    from archzoo.training.build import build_task, check_memory, choose_widths, data_dir, resolve_device, total_steps
    from archzoo.training.distributed import launched
    from archzoo.training.run import make_callbacks

    processes = int(os.environ["WORLD_SIZE"]) if launched() else 0
    if processes and plan.parallel:
        errors.append(
            f"hydra/launcher={plan.launcher}: trains each run in a process of its own, and torchrun has started "
            f"{processes} that train them together; leave out one or the other"
        )
    for config in distinct:
        errors += [line for line in process_errors(config, processes) if line not in errors]
        try:
            _check_baseline(config)
            data_dir(config)
            task = build_task(config)
            match = choose_widths(config, task)
            check_memory(config, task, match)
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
        try:
            probe.write_bytes(bytes(PROBE_BYTES))
        finally:
            probe.unlink(missing_ok=True)
    except (OSError, ValueError) as error:  # the latter: a name that no file can have
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(
            f"output_dir={str(folder)[:200]}: cannot be written ({reason}); give a folder that can, as "
            "output_dir=outputs/mine"
        ) from error
    finally:
        for part in reversed(made):
            part.rmdir()


# ---- running it

_stop_signal: list[int] = []
_stop_files: list[Path] = []  # of the sweep that this process has started
_progress: "list[Progress]" = []
_looked = [0.0, False]  # when the file was last looked for, and whether it was there


def should_stop() -> bool:
    """Whether a signal has asked this process, or the one that started the sweep, to stop."""
    if not _stop_signal and STOP in os.environ and time.monotonic() - _looked[0] > LOOK_EVERY:
        _looked[:] = time.monotonic(), Path(os.environ[STOP]).exists()
    return bool(_stop_signal or _looked[1])


def _on_signal(number: int, frame: Any) -> None:
    if _stop_signal:  # the second one: at once
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        return
    _stop_signal.append(number)
    for path in _stop_files:  # a launcher's jobs get no signal that was sent to this process
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    say("stopping after this step; the same command goes on from here (again to stop at once)")


def run_job(composed: "DictConfig") -> dict[str, Any]:
    """One run of a sweep, in this process or in one of a launcher's. Returns its record."""
    from archzoo.training.launching import saved_before_requeue

    for name in filter(None, os.environ.get(IMPORTS, "").split(",")):
        sys.path.insert(0, str(Path.cwd())) if _beside(name) else None
        importlib.import_module(name)
    config = to_config(composed)
    validate(config)
    if _progress:  # in the main process
        return _run(config, _progress[0])
    from hydra.core.hydra_config import HydraConfig

    from archzoo.training.progress import SweepProgress

    if (run := run_id(asdict_plain(config))) in os.environ.get(LEFT_OUT, "").split(","):
        return {"run_id": run, "status": "left out"}
    _looked[:] = 0.0, False
    number = int(getattr(HydraConfig.get().job, "num", 0)) + 1
    progress = SweepProgress(int(os.environ.get(RUNS, number)), bars=False, number=number)
    with _signals(), saved_before_requeue(_on_signal):
        return _run(config, progress)


def _run(config: TrainConfig, progress: "Progress") -> dict[str, Any]:
    from archzoo.training.run import execute, run_name

    if should_stop():
        return {"run_id": run_id(asdict_plain(config)), "name": run_name(config), "status": "interrupted"}
    return execute(config, progress=progress, should_stop=should_stop)


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """Inside, the first signal asks the runs to stop; SLURM warns of its time limit by SIGUSR1, a terminal by SIGHUP.

    These two are left to whom has a use for them, as a launcher or nohup.
    """
    ours = [n for n in SIGNALS if n in (signal.SIGINT, signal.SIGTERM) or signal.getsignal(n) is signal.SIG_DFL]
    before = {number: signal.signal(number, _on_signal) for number in ours}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _hydra_main(argv: list[str]) -> None:
    import hydra

    before, sys.argv = sys.argv, [sys.argv[0], *argv]
    try:
        hydra.main(config_path=str(config_folder()), config_name="train", **_version_base())(run_job)()
    finally:
        sys.argv = before


def _train_together(plan: Plan, began: float) -> int:
    """Trains as one of the processes that torchrun has started; rank 0 leads them from run to run, and reports."""
    from archzoo.training import distributed
    from archzoo.training.build import resolve_device
    from archzoo.training.run import execute

    trainer, statuses = plan.configs[0].trainer, []
    try:
        with distributed.group(resolve_device(trainer.device), trainer.rank_timeout):
            leads = distributed.rank() == 0
            if leads:
                _run_all(plan)
                distributed.begin_run()
                distributed.agree({"status": distributed.END, "error": None})
            else:
                with _signals():
                    for config in plan.configs:
                        statuses.append(execute(config, should_stop=should_stop)["status"])
                        if statuses[-1] == distributed.END:
                            break
    except distributed.RankLost as lost:
        distributed.end_process(lost)
    if leads:
        return _report(plan, began)
    if _stop_signal:
        return _stopped()
    return EXIT_FAILED if "failed" in statuses else EXIT_DIVERGED if "diverged" in statuses else 0


def _run_all(plan: Plan) -> None:
    from archzoo.training.progress import SweepProgress

    progress = SweepProgress(len(plan.configs), bars=False if plan.parallel else None)
    try:
        with _signals():
            if plan.parallel:
                _launch(plan, progress)
            else:
                _progress.append(progress)
                _hydra_main(plan.argv)
    finally:
        progress.close()
        _progress.clear()


def _launch(plan: Plan, progress: "SweepProgress") -> None:
    """Hands the runs to a launcher's processes; those that it loses do not take the others with them."""
    from archzoo.training.launching import Watcher, job_environment, settled_jobs

    # Beside the runs, for jobs on other hosts see that folder, and need not see another of this one.
    stop = Path(plan.configs[0].output_dir).absolute() / f".stop-{platform.node()}-{os.getpid()}"
    stop.unlink(missing_ok=True)
    _stop_files.append(stop)
    told = {IMPORTS: os.environ.get(IMPORTS, ""), RUNS: str(len(plan.configs)), STOP: str(stop)}
    seen = contextlib.nullcontext() if "joblib" in plan.launcher else Watcher(plan.folders(), progress)
    before, os.environ["HYDRA_FULL_ERROR"] = os.environ.get("HYDRA_FULL_ERROR", "0"), "1"  # hydra shall raise, not exit

    def attempt(left_out: set[str]) -> set[str]:
        """Trains the runs but these; returns those that were going on if the launcher gave up."""
        try:
            _hydra_main([*plan.argv, *job_environment(told | {LEFT_OUT: ",".join(sorted(left_out))})])
        except Exception as error:  # as joblib's, which ends all processes where one is killed
            print(f"error: the launcher gave up: {type(error).__name__}: {_first_line(error)}", file=sys.stderr)
            return set() if _stop_signal else _going_on(plan) - left_out
        return set()

    try:
        with settled_jobs(plan.launcher), seen:
            suspects: set[str] = set()
            while found := attempt(suspects):
                suspects |= found
                print(f"going on without the {len(suspects)} runs that it was training", file=sys.stderr)
            for suspect in sorted(suspects):  # each by itself: one of them ends its process
                if not _stop_signal:
                    attempt({folder.name for folder in plan.folders()} - {suspect})
    finally:
        os.environ["HYDRA_FULL_ERROR"] = before
        _stop_files.clear()
        stop.unlink(missing_ok=True)


def _going_on(plan: Plan) -> set[str]:
    from archzoo.training.run import read_record

    records = {folder.name: read_record(folder) for folder in plan.folders()}
    return {run for run, record in records.items() if record and record["status"] == "running"}


def _report(plan: Plan, began: float) -> int:
    from archzoo.training.run import read_record

    root, folders = Path(plan.configs[0].output_dir), plan.folders()
    records = [read_record(folder) for folder in folders]
    statuses = [record["status"] if record else "missing" for record in records]
    if plan.multirun:
        _print_comparison(root)
    _print_places(root, folders, plan, statuses, time.monotonic() - began)
    troubles = [record.get("checkpoint_error") if record else None for record in records]
    for record, trouble in zip(records, troubles, strict=True):
        if record and trouble:
            print(f"error: {record['name']}: {trouble}", file=sys.stderr)
    if _stop_signal:
        return _stopped()
    if not all(trouble for trouble, status in zip(troubles, statuses, strict=True) if status in UNFINISHED):
        return EXIT_FAILED
    if any(troubles):
        return EXIT_CHECKPOINT
    return EXIT_DIVERGED if "diverged" in statuses else 0


def _stopped() -> int:
    return 128 + (signal.SIGINT if _stop_signal[0] == signal.SIGINT else signal.SIGTERM)


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
