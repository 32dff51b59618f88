"""From a command line to the configurations of its runs: composed by Hydra, and checked before anything is trained.

Nothing that is slow to import is imported before it is needed.
"""

import inspect
import json
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from archzoo.names import suggest
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

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig

PROBE_BYTES = 1 << 16  # a disk with less room takes no record of a run


def config_folder() -> Path:
    """The YAML files: inside the package where it is installed, beside it in a checkout."""
    package = Path(__file__).parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


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
            if o.get_key_element() == group and not o.is_sweep_override() and not isinstance(o.value(), str | dict):
                raise ConfigError(
                    f"{o.input_line}: must be the name of one {group}, or settings of it, as {group}={{KEY: VALUE}}; "
                    "leave it out for the usual one"
                )
    if args.config_dir:
        _check_borrowed_primary(args.config_name, Path(args.config_dir))
        overrides += parser.parse_overrides([f"hydra.searchpath=[file://{Path(args.config_dir).absolute()}]"])
    folder = config_folder()
    with initialize_config_dir(str(folder), job_name="train", **version_base()):
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
        raise ConfigError(f"--config-name {name}: cannot be read ({first_line(error)})") from error
    if not isinstance(config, DictConfig):
        raise ConfigError(f"--config-name {name}: holds a list; a configuration is a mapping of keys to values")
    check_primary(f"--config-name {name}", _unresolved(config))


def without_sweeps(argv: list[str]) -> list[str]:
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
        raise ConfigError(f"{error.full_key or 'configuration'}: {first_line(error)}") from error
    except (
        HydraException,
        YAMLError,
        OSError,
        ValueError,
        TypeError,
        RecursionError,
    ) as error:  # of a file of anyone's
        raise ConfigError(f"configuration: cannot be composed ({first_line(error)})") from error


def first_line(error: Exception) -> str:
    """The first line of what an error says, or its class where it says nothing."""
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


def version_base() -> dict[str, Any]:
    """Asks hydra 1.3 for its present defaults; 1.4 has them anyway, and warns of the argument."""
    import hydra

    return {"version_base": "1.3"} if hydra.__version__.startswith("1.3.") else {}


def store_schema() -> None:
    """Makes our schema and our launcher for Ray known to Hydra."""
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

    from archzoo.training.build import (
        build_task,
        check_memory,
        check_model,
        choose_widths,
        data_dir,
        resolve_device,
        total_steps,
    )
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
            check_model(config, task, match, make_callbacks(config))
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

    from archzoo.training.optimizing import build_optimizer

    known = {path.stem for path in (config_folder() / "optimizer").glob("*.yaml")}
    if config.optimizer.options or config.optimizer.name not in known:
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
