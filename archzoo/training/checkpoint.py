"""Checkpoints: folders of safetensors and JSON, complete or absent, and verified before a byte of them is used.

A checkpoint is written as `step_00000120.tmp-<pid>/`, each file synced, the manifest (size and SHA-256 of every file)
last, and then renamed. A reader takes the newest folder whose manifest verifies. Nothing is ever unpickled.
"""

import hashlib
import json
import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

FORMAT = 1
MANIFEST = "manifest.json"


class CheckpointError(RuntimeError):
    """A checkpoint is damaged or of another model. The message names the file and what is wrong with it."""


def write_file(path: Path, data: bytes) -> None:
    """Writes and syncs a new file."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, data: bytes) -> None:
    """Puts a whole file in the place of another; a reader sees the old one or the new one."""
    partial = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        write_file(partial, data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes renames inside a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def pack_tensors(tensors: Mapping[str, Tensor]) -> bytes:
    """Tensors as safetensors bytes; tensors that share memory are each stored whole."""
    return save_safetensors({key: t.detach().cpu().contiguous().clone() for key, t in tensors.items()})


def save_checkpoint(
    folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], keep: int
) -> Path:
    """Writes one checkpoint, and deletes the older ones beyond `keep` once it is in place.

    Args:
        folder: Holds all checkpoints of a run.
        step: Optimizer steps done.
        tensors: File stem -> name -> tensor, as `{"model": …, "optim": …}`.
        state: What else is needed to go on; plain JSON.
        keep: How many of the newest checkpoints stay.

    Raises:
        OSError: If it cannot be written; the older ones are left as they are.
    """
    final = folder / f"step_{step:08d}"
    partial = folder / f"{final.name}.tmp-{os.getpid()}"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        files = {f"{stem}.safetensors": pack_tensors(named) for stem, named in tensors.items()}
        files["state.json"] = json.dumps({"format": FORMAT, "step": step, **state}, sort_keys=True).encode()
        manifest = {}
        for name, data in files.items():
            write_file(partial / name, data)
            manifest[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        write_file(partial / MANIFEST, json.dumps({"format": FORMAT, "files": manifest}, indent=1).encode())
        sync_folder(partial)
        if final.exists():  # the same step again, after a resume from an older one
            shutil.rmtree(final)
        partial.rename(final)
        sync_folder(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for old in list_checkpoints(folder)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first. Whether they are sound is for `load_checkpoint` to say."""
    if not folder.is_dir():
        return []
    found = [p for p in folder.iterdir() if p.name.startswith("step_") and p.name[5:].isdigit()]
    return sorted(found, key=lambda p: int(p.name[5:]), reverse=True)


def sweep_partial(folder: Path) -> None:
    """Removes what a writer that was killed has left behind."""
    if folder.is_dir():
        for partial in folder.glob("step_*.tmp-*"):
            shutil.rmtree(partial, ignore_errors=True)


def load_checkpoint(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Reads a checkpoint, each file checked against the manifest.

    Returns:
        The tensors as given to `save_checkpoint`, and the state.

    Raises:
        CheckpointError: If a file is missing, or is not what was written.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        entries = {str(name): (int(e["bytes"]), str(e["sha256"])) for name, e in manifest["files"].items()}
        if manifest["format"] != FORMAT:
            raise CheckpointError(f"{path}: format {manifest['format']!r}, and this version reads format {FORMAT}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path / MANIFEST}: not a manifest ({error})") from error
    tensors: dict[str, dict[str, Tensor]] = {}
    state: dict[str, Any] | None = None
    for name, (size, digest) in entries.items():
        file = path / name
        if Path(name).name != name:
            raise CheckpointError(f"{path / MANIFEST}: names a file outside the checkpoint: {name!r}")
        try:
            if file.stat().st_size != size:
                raise CheckpointError(f"{file}: {file.stat().st_size} bytes, and {size} were written")
            data = file.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read ({error})") from error
        if hashlib.sha256(data).hexdigest() != digest:
            raise CheckpointError(f"{file}: its SHA-256 is not the manifest's; the file is damaged")
        try:
            if file.suffix == ".safetensors":
                tensors[file.stem] = load_safetensors(data)
            elif name == "state.json":
                state = json.loads(data)
        except (SafetensorError, ValueError) as error:
            raise CheckpointError(f"{file}: cannot be parsed ({error})") from error
    if state is None:
        raise CheckpointError(f"{path}: state.json is missing")
    return tensors, state


SEPARATOR = "::"  # between a parameter's name, an optimizer's names of its state, and a place in a list of it


def get_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Model and optimizer as one flat dictionary of tensors, and what else the optimizer holds as plain JSON."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    if optimizer.state and not isinstance(optimizer, torch.optim.LBFGS):
        own, optim = cast(Any, get_state_dict(model, optimizer, options=options))
    else:  # torch would take an empty step to make a state, and the run would go on from that; L-BFGS cannot even do so
        own = get_model_state_dict(model, options=options)
        names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
        groups = [{**group, "params": [names[p] for p in group["params"]]} for group in optimizer.param_groups]
        optim = {"state": {names[p]: state for p, state in optimizer.state.items()}, "param_groups": groups}
    tensors: dict[str, Tensor] = {f"model.{name}": value for name, value in own.items()}
    numbers: dict[str, Any] = {}

    def put(name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            tensors[f"optim.{name}"] = value
        elif isinstance(value, list):  # as the directions that L-BFGS remembers
            numbers[name] = {"length": len(value)}
            for i, part in enumerate(value):
                put(f"{name}{SEPARATOR}{i}", part)
        else:
            numbers[name] = value

    for parameter, state in optim["state"].items():
        for key, value in state.items():
            if not (key == "al" and isinstance(optimizer, torch.optim.LBFGS)):  # room to work in, not memory
                put(f"{parameter}{SEPARATOR}{key}", value)
    return tensors, {"state": numbers, "param_groups": optim["param_groups"]}


def set_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]
) -> None:
    """The inverse of `get_state`.

    Raises:
        CheckpointError: If a tensor is missing, left over, or of another shape than the model's.
    """
    set_model_state(model, tensors)
    set_optimizer_state(model, optimizer, tensors, numbers)


def set_model_state(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Loads the model's part of what `get_state` returned.

    Raises:
        CheckpointError: If a tensor is missing, left over, or of another shape than the model's.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    own = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
    try:
        set_model_state_dict(model, cast(Any, own), options=StateDictOptions(full_state_dict=_in_a_group()))
    except (RuntimeError, KeyError, ValueError) as error:
        raise CheckpointError(f"the checkpoint is of another model: {error}") from error


def set_optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]
) -> None:
    """Loads the optimizer's part of what `get_state` returned.

    Raises:
        CheckpointError: If it is of another optimizer or model.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

    # Cloned, for a tensor in a file's bytes begins anywhere, and that can decide the last bit of a dot product with it.
    flat = {name.removeprefix("optim."): t.clone() for name, t in tensors.items() if name.startswith("optim.")}
    flat |= numbers["state"]
    state: dict[str, dict[str, Any]] = {}
    for name, value in flat.items():
        parameter, key, *place = name.split(SEPARATOR)
        if not place:
            state.setdefault(parameter, {})[key] = (
                [flat[f"{name}{SEPARATOR}{i}"] for i in range(value["length"])] if isinstance(value, dict) else value
            )
    # JSON made lists of tuples, as of Adam's betas.
    groups = [
        {k: tuple(v) if isinstance(v, list) and k != "params" else v for k, v in group.items()}
        for group in numbers["param_groups"]
    ]
    try:
        if isinstance(optimizer, torch.optim.LBFGS):
            optimizer.load_state_dict({"state": state, "param_groups": groups})
            return
        set_optimizer_state_dict(
            model,
            optimizer,
            optim_state_dict=cast(Any, {"state": state, "param_groups": groups}),
            # In one process nothing is sharded, and torch's path for full states needs an optimizer that has any. Not
            # every parameter has a state: right after a grid update or a refinement some have none.
            options=StateDictOptions(full_state_dict=_in_a_group(), strict=False),
        )
    except (RuntimeError, KeyError, ValueError) as error:
        raise CheckpointError(f"the checkpoint is of another model or optimizer: {error}") from error
    # torch makes a state for every parameter before it loads.
    for name, own in model.named_parameters():
        if name not in state:
            optimizer.state.pop(own, None)


def _in_a_group() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def get_random_state() -> dict[str, Any]:
    """The state of every global random generator, as plain JSON."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, internal, gauss_next = random.getstate()
    state = {
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "python": [version, list(internal), gauss_next],
        "numpy": [name, np.asarray(keys).tolist(), int(position), int(has_gauss), float(gauss)],
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = [s.numpy().tobytes().hex() for s in torch.cuda.get_rng_state_all()]
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """The inverse of `get_random_state`."""
    torch.set_rng_state(torch.frombuffer(bytearray.fromhex(state["torch"]), dtype=torch.uint8))
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([torch.frombuffer(bytearray.fromhex(s), dtype=torch.uint8) for s in state["cuda"]])
