"""What a configuration may not do, whoever wrote it: run code, read the environment, keep secrets, write elsewhere.

Names in a configuration go through our registries. Hydra alone would import and call what `_target_` names, set up
logging from dictionaries (which may call anything too), and fetch more configurations from where `hydra.searchpath`
says. So what Hydra is told comes from our own files and from the command line; a file from `--config-dir` sets the
runs of its sweep (`hydra.mode`, `hydra.sweeper.params`) and nothing else of Hydra.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from archzoo.training.config import ConfigError

# What hydra's `instantiate` acts on: _target_, _args_, _partial_, _recursive_, _convert_, _mode_.
_RESERVED = re.compile(r"_\w+_")
# A value of another key. Not a resolver, as ${oc.env:HOME}, and not what hydra was told: that may hold environments.
_PLAIN = re.compile(r"\$\{\.*(?:(?!hydra\b)[A-Za-z_]|hydra\.runtime\.choices\.)[\w.-]*\}")
_SECRET = re.compile(r"(?i)(?:key|token|secret|password|passwd|passphrase|credentials?)$")
_LAUNCHER = re.compile(
    r"hydra\._internal\.core_plugins\.basic_launcher\.BasicLauncher"
    r"|hydra_plugins\.hydra_(?:joblib|submitit|ray)_launcher\.\w+\.\w+Launcher"
    r"|archzoo\.training\.launching\.\w+"
)
_SWEEPER = re.compile(r"hydra\._internal\.core_plugins\.basic_sweeper\.BasicSweeper")
# Of the hydra part: what a file may set, and what hydra itself writes there.
_FREE = ("mode", "sweeper.params", "runtime", "overrides", "job.config_name", "job.override_dirname", "job.name")


def looks_secret(key: str) -> bool:
    """Whether a key ends as those of secrets do: api_key, token, client_secret, password."""
    return _SECRET.search(key) is not None


def hide_secret(setting: str) -> str:
    """A setting KEY=VALUE as an error may show it.

    >>> hide_secret("trainer.api_key=1234")
    'trainer.api_key=…'
    """
    key, equals, _ = setting.partition("=")
    return f"{key}=…" if equals and looks_secret(key) else setting


def check_values(config: Mapping[str, Any]) -> None:
    """Checks a composed configuration, interpolations not yet resolved.

    Raises:
        ConfigError: With a line for each key that names code to run, for each value that is computed or is no plain
            text, number, truth value, list or mapping, and for each key of a secret.
    """
    errors = list(_value_errors(config, ""))
    if errors:
        raise ConfigError("\n".join(errors))


def _value_errors(value: Any, key: str) -> Iterator[str]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            where = f"{key}.{name}".lstrip(".")
            if not isinstance(name, str):
                yield f"{where}: keys must be text, and this one is {name!r}; write {str(name)!r} in quotes"
            elif _RESERVED.fullmatch(name):
                yield f"{where}: a configuration cannot name code to be run; say what to use by its registered name"
            elif looks_secret(name) and key != "swap":  # globs over modules, which may be called so: "*.attn.key"
                yield (
                    f"{where}=…: looks like a secret, and configurations are recorded and shown; leave it out, and "
                    "give it in the environment (as WANDB_API_KEY) or in ~/.netrc"
                )
            else:
                yield from _value_errors(inner, where)
    elif value == "???":
        yield f"{key}=???: is yet to be set, as by {key}=VALUE"
    elif isinstance(value, str):
        rest = _PLAIN.sub("", value)
        if "${" in rest:
            yield (
                f"{key}={value}: only the value of another key can be taken over, as ${{task.name}}; write the value "
                'itself, or have the shell put it in, as KEY="$NAME"'
            )
    elif isinstance(value, Sequence) and not isinstance(value, bytes):
        for i, inner in enumerate(value):
            yield from _value_errors(inner, f"{key}.{i}")
    elif not (value is None or isinstance(value, bool | int | float)):
        yield f"{key}={value!r}: a {type(value).__name__} is not plain YAML; write a text, number, list or mapping"


def check_launching(hydra: Mapping[str, Any]) -> None:
    """Checks what hydra is about to import and call, and to write into `multirun.yaml`.

    Raises:
        ConfigError: If the launcher or the sweeper is not one of those that are known, or if a variable of the jobs'
            environment looks like a secret.
    """
    for name in (hydra.get("job") or {}).get("env_set") or {}:
        if looks_secret(str(name)):
            raise ConfigError(
                f"hydra.job.env_set.{name}=…: looks like a secret, and hydra writes it to multirun.yaml; export {name} "
                "in the shell instead"
            )
    for part, known, right in (
        ("launcher", _LAUNCHER, "choose hydra/launcher=basic, joblib, submitit_local, submitit_slurm or ray"),
        ("sweeper", _SWEEPER, "leave it out: hydra/sweeper=basic"),
    ):
        target = (hydra.get(part) or {}).get("_target_")
        if not isinstance(target, str) or not known.fullmatch(target):
            raise ConfigError(f"hydra.{part}._target_={target}: no {part} that archzoo knows; {right}")


def check_primary(name: str, config: Mapping[str, Any]) -> None:
    """Checks a file that is to be composed in the place of train.yaml, before hydra looks at it.

    Raises:
        ConfigError: If it sets more of hydra than its sweep.
    """
    hydra = config.get("hydra")
    _refuse(name, _leaves(hydra, "") if isinstance(hydra, Mapping) else {"": hydra} if hydra is not None else {})


def check_hydra(composed: Mapping[str, Any], trusted: Mapping[str, Any]) -> None:
    """Checks that files from elsewhere have changed nothing of hydra but the sweep.

    Args:
        composed: The hydra part of the configuration, not resolved.
        trusted: The same of our own files and of what the command line sets in it.

    Raises:
        ConfigError: With the first key that differs.
    """
    theirs, ours = _leaves(composed, ""), _leaves(trusted, "")
    differing = {key: theirs.get(key) for key in theirs | ours if theirs.get(key) != ours.get(key)}
    differing.pop("searchpath", None)  # the command line's: `check_primary` has refused any other
    _refuse("a file of --config-dir", differing)


def _refuse(whose: str, leaves: Mapping[str, Any]) -> None:
    for key, value in leaves.items():
        if not any(key == free or key.startswith(f"{free}.") for free in _FREE):
            raise ConfigError(
                f"hydra.{key}={value}: {whose} may set hydra.mode and hydra.sweeper.params, and nothing else of hydra; "
                "set it on the command line"
            )


def check_sweep(keys: Sequence[str]) -> None:
    """Checks the keys that `hydra.sweeper.params` of a file sweeps over.

    Raises:
        ConfigError: If one is hydra's, as `hydra.searchpath`.
    """
    for key in keys:
        if re.match(r"[+~@:]*hydra\b", key):
            raise ConfigError(f"hydra.sweeper.params.{key}: a sweep is over settings of the runs, not of hydra")


def check_folders(folders: Mapping[str, str | None]) -> None:
    """Checks folders that were named by a file, not by the command line.

    Args:
        folders: Key -> folder.

    Raises:
        ConfigError: If one is not inside the folder that the command runs in.
    """
    for key, folder in folders.items():
        path = PurePath(folder or ".")
        if path.is_absolute() or ".." in path.parts or str(folder).startswith("~"):
            raise ConfigError(
                f"{key}={folder}: a file may name a folder inside this one only; for another, write {key}={folder} on "
                "the command line"
            )


def _leaves(config: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        leaves |= _leaves(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return leaves
