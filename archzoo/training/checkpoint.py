"""Checkpoints: folders of safetensors and JSON, complete or absent, and verified before a byte of them is used.

A checkpoint is written as `step_00000120.tmp-<pid>/`, each file synced, the manifest (size and SHA-256 of every file)
last, and then renamed. Older ones go only once it has been read back. A reader takes the newest folder whose manifest
verifies. Nothing is ever unpickled.

A checkpoint says which format it has. A version of archzoo reads the format that it writes, and those that the two
minor versions before it wrote; any other is refused with the version that wrote it.
"""

import contextlib
import errno
import hashlib
import json
import os
import random
import re
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

from archzoo._version import __version__

FORMAT = 1
READABLE = (1,)
"""Formats that are read: at least those of the two minor versions before this one."""
MANIFEST = "manifest.json"
STATE_BYTES = 1 << 26
"""Largest state.json that is read: parsed, JSON takes many times its size."""
CHUNK = 1 << 20  # bytes that are read back at once
MANIFEST_BYTES = 1 << 20
"""Largest manifest that is read; ours have some hundred bytes."""


class CheckpointError(RuntimeError):
    """A checkpoint is damaged or of another model. The message names the file and what is wrong with it."""


class SaveError(CheckpointError):
    """Checkpoints cannot be written. The message names where, the bytes needed and the bytes free."""


class FormatError(CheckpointError):
    """A checkpoint is of a format that this version of archzoo does not read: no reason to go on from an older one."""


def write_file(path: Path, *parts: bytes | memoryview) -> None:
    """Writes and syncs a new file."""
    with path.open("wb") as file:
        for part in parts:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())


def _write_checked(path: Path, parts: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Writes a file and reads it back; returns its size and SHA-256 as a manifest has them."""
    kept, digest = list(parts), hashlib.sha256()
    for part in kept:
        digest.update(part)
    write_file(path, *kept)
    with path.open("rb", buffering=0) as file:
        for part in kept:
            for start in range(0, len(part), CHUNK):
                chunk = part[start : start + CHUNK]
                if file.read(len(chunk)) != bytes(chunk):  # bytes: a memoryview is compared element by element
                    raise OSError(errno.EIO, "what was written is not what is read", str(path))
    return {"bytes": sum(map(len, kept)), "sha256": digest.hexdigest()}


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


DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What safetensors calls them."""


def _parts(tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
    """A safetensors file in parts, none of which is a copy of a tensor that lies in memory as in the file."""
    header, stored, end = {}, [], 0
    # The widest first, so that each lies at a multiple of its element's size.
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        if tensor.dtype not in DTYPES:
            raise ValueError(f"tensor {name} is {tensor.dtype}; a checkpoint holds {', '.join(map(str, DTYPES))}")
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        stored.append(tensor)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for tensor in stored:
        whole = tensor.detach().cpu().contiguous()
        # What has one element is contiguous whatever its strides are, and is not viewed as bytes unless they are 1.
        flat: Any = whole.as_strided((whole.numel(),), (1,)).view(torch.uint8).numpy()
        yield memoryview(flat)


def pack_tensors(tensors: Mapping[str, Tensor]) -> bytes:
    """Tensors as safetensors bytes; tensors that share memory are each stored whole."""
    return b"".join(_parts(tensors))


def save_checkpoint(
    folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], keep: int
) -> Path:
    """Writes one checkpoint, and deletes the others beyond `keep` once it is in place and has been read back.

    Of the others, those of a later step go first: they are of a future that the run did not resume from.

    Args:
        folder: Holds all checkpoints of a run.
        step: Optimizer steps done.
        tensors: File stem -> name -> tensor, as `{"model": …, "optim": …}`.
        state: What else is needed to go on; plain JSON.
        keep: How many of the newest checkpoints stay.

    Raises:
        OSError: If it cannot be written, or is read back otherwise; the older ones are left as they are.
    """
    final = folder / f"step_{step:08d}"
    partial = folder / f"{final.name}.tmp-{os.getpid()}"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        text = json.dumps({"format": FORMAT, "step": step, **state}, sort_keys=True).encode()
        files: dict[str, Iterable[bytes | memoryview]] = {
            **{f"{stem}.safetensors": _parts(named) for stem, named in tensors.items()},
            "state.json": [text],
        }
        listing = {name: _write_checked(partial / name, parts) for name, parts in files.items()}
        manifest = {"format": FORMAT, "archzoo": __version__, "files": listing}
        _write_checked(partial / MANIFEST, [json.dumps(manifest, indent=1).encode()])
        sync_folder(partial)
        if final.exists():  # the same step again, after a resume from an older one: this one could not be used
            _remove(final)
        partial.rename(final)
        sync_folder(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    others = [path for path in list_checkpoints(folder) if path != final]
    later = [path for path in others if int(path.name[5:]) > step]
    for path in later + others[len(later) :][keep - 1 :]:
        with contextlib.suppress(OSError):
            _remove(path)
    return final


def _remove(path: Path) -> None:
    """Removes a checkpoint in one blow: a process that is killed here leaves it whole or, to be swept, unnamed."""
    unnamed = path.with_name(f"{path.name}.tmp-{os.getpid()}-old")
    path.rename(unnamed)
    shutil.rmtree(unnamed, ignore_errors=True)


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first. Whether they are sound is for `load_checkpoint` to say."""
    if not folder.is_dir():
        return []
    found = [p for p in folder.iterdir() if re.fullmatch("step_[0-9]{8,18}", p.name)]
    return sorted(found, key=lambda p: int(p.name[5:]), reverse=True)


def sweep_partial(folder: Path) -> None:
    """Removes what a writer that was killed has left behind: half of a checkpoint, or of another file."""
    for partial in folder.glob("*.tmp-*"):
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


def load_checkpoint(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Reads a checkpoint, each file checked against the manifest.

    Returns:
        The tensors as given to `save_checkpoint`, and the state.

    Raises:
        FormatError: If it is of a format that this version does not read.
        CheckpointError: If a file is missing, or is not what was written.
    """
    entries = _read_manifest(path)
    tensors: dict[str, dict[str, Tensor]] = {}
    state: Any = None
    for name, (size, digest) in entries.items():
        file = path / name
        data = _read(file, size if file.suffix == ".safetensors" else min(size, STATE_BYTES))
        if len(data) != size:
            raise CheckpointError(f"{file}: {len(data)} bytes, and {size} were written")
        if hashlib.sha256(data).hexdigest() != digest:
            raise CheckpointError(f"{file}: its SHA-256 is not the manifest's; the file is damaged")
        try:
            if file.suffix == ".safetensors":
                tensors[file.stem] = load_safetensors(data)
            elif name == "state.json":
                state = json.loads(data)
        except Exception as error:  # parsers raise many kinds on bytes that nobody wrote by our rules
            raise CheckpointError(f"{file}: cannot be parsed ({error})") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path / 'state.json'}: missing, or does not hold a JSON object")
    step = state.get("step")
    if type(step) is not int or path.name != f"step_{step:08d}":
        raise CheckpointError(f"{path}: its state is that of step {step!r}")
    return tensors, state


def load_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file that no manifest speaks of, as `model.safetensors` of a run.

    Raises:
        CheckpointError: If it is not one, or does not fit into memory.
    """
    data = _read(file, _memory())
    try:
        return load_safetensors(data)
    except Exception as error:  # as above
        raise CheckpointError(f"{file}: cannot be parsed ({error})") from error


def _read_manifest(path: Path) -> dict[str, tuple[int, str]]:
    """File -> size and SHA-256."""
    file = path / MANIFEST
    data = _read(file, MANIFEST_BYTES)
    try:
        manifest = json.loads(data)
        entries = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
        version = manifest["format"], manifest.get("archzoo", "an unknown version")
    except Exception as error:  # whatever is not there, or of another type
        raise CheckpointError(f"{file}: not a manifest ({type(error).__name__}: {error})") from error
    for name, (size, digest) in entries.items():
        if not re.fullmatch(r"\w[\w.-]*", name, re.ASCII):
            raise CheckpointError(f"{file}: names a file outside the checkpoint: {name!r}")
        if type(size) is not int or size < 0 or type(digest) is not str:
            raise CheckpointError(f"{file}: says {size!r} bytes with SHA-256 {digest!r} of {name}")
    if version[0] not in READABLE or type(version[0]) is not int:
        raise FormatError(
            f"{path}: format {version[0]!r}, written by archzoo {version[1]}; archzoo {__version__} reads format "
            f"{', '.join(map(str, READABLE))}: go on with the version that wrote it"
        )
    return entries


def _read(file: Path, limit: int) -> bytes:
    """A regular file of at most `limit` bytes; what is larger is refused before there is room made for it."""
    try:
        found = file.stat()
        if not stat.S_ISREG(found.st_mode):  # a pipe would be waited for, a device has no end
            raise CheckpointError(f"{file}: not a regular file")
        if found.st_size > limit:
            raise CheckpointError(f"{file}: {found.st_size} bytes, and at most {limit} were written")
        if found.st_size > _memory():
            raise CheckpointError(f"{file}: {found.st_size} bytes, which is more than this machine's memory")
        return file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from error


def _memory() -> int:
    """Bytes of physical memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


SEPARATOR = "::"  # between a parameter's name, an optimizer's names of its state, and a place in a list of it


def get_weights(model: nn.Module, sharded: bool = False) -> dict[str, Tensor]:
    """A copy of a model's state dict on the CPU; of a sharded model the whole in rank 0, and nothing elsewhere."""
    if not sharded:
        return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = cast(dict[str, Tensor], get_model_state_dict(model, options=options))
    buffers = {name for name, value in model.state_dict().items() if not hasattr(value, "full_tensor")}
    # What is put together is a copy, and what is not, as buffers, would change with the model.
    return {name: value.clone() if name in buffers else value for name, value in weights.items()}


def set_weights(model: nn.Module, weights: Mapping[str, Tensor], sharded: bool = False) -> None:
    """The inverse of `get_weights`."""
    if sharded:
        set_model_state(model, {f"model.{name}": value for name, value in weights.items()}, sharded)
    else:
        model.load_state_dict(weights)


def get_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Model and optimizer as one flat dictionary of tensors, and what else the optimizer holds as plain JSON.

    In a process group, all processes must ask for it, and rank 0 gets it: the others get nothing.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    if optimizer.state and not isinstance(optimizer, torch.optim.LBFGS):
        own, optim = cast(Any, get_state_dict(model, optimizer, options=options))
    else:  # torch would take an empty step to make a state, and the run would go on from that; L-BFGS cannot even do so
        own = get_model_state_dict(model, options=options)
        names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
        groups = [{**group, "params": [names[p] for p in group["params"]]} for group in optimizer.param_groups]
        optim = {"state": {names[p]: state for p, state in optimizer.state.items()}, "param_groups": groups}
    if _in_a_group() and torch.distributed.get_rank() > 0:
        return {}, {}
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


def set_model_state(model: nn.Module, tensors: Mapping[str, Tensor], sharded: bool = False) -> None:
    """Loads the model's part of what `get_state` returned; of a sharded model rank 0 has it, and it is sent from there.

    Raises:
        CheckpointError: If a tensor is missing, left over, or of another shape than the model's.
    """
    own = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
    try:
        model.load_state_dict(_spread_like(model, own) if sharded else own)
    except (RuntimeError, KeyError, ValueError) as error:
        raise CheckpointError(f"the checkpoint is of another model: {error}") from error


def _spread_like(model: nn.Module, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rank 0's tensors as a sharded model holds them; torch's way leaves out further names of what has several."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    present, first = model.state_dict(), torch.distributed.get_rank() == 0
    shapes = {name: (t.shape, t.dtype) for name, t in present.items()}
    if first and (other := {name: (t.shape, t.dtype) for name, t in own.items()}) != shapes:
        differing = sorted({name for name, _ in shapes.items() ^ other.items()})
        raise ValueError(f"{', '.join(differing)}: missing, left over, or of another shape or dtype")
    spread: dict[str, Tensor] = {}
    for name, held in present.items():
        value = own[name].to(held.device) if first else torch.empty(held.shape, dtype=held.dtype, device=held.device)
        torch.distributed.broadcast(value, src=0)
        if isinstance(held, DTensor):
            value = distribute_tensor(value, held.device_mesh, held.placements, src_data_rank=None)
        spread[name] = value
    return spread


def set_optimizer_state(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, Tensor],
    numbers: Mapping[str, Any],
    sharded: bool = False,
) -> None:
    """Loads the optimizer's part of what `get_state` returned; of a sharded model rank 0's tensors count.

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
            options=StateDictOptions(full_state_dict=_in_a_group(), broadcast_from_rank0=sharded, strict=False),
        )
    except (RuntimeError, KeyError, ValueError) as error:
        raise CheckpointError(f"the checkpoint is of another model or optimizer: {error}") from error
    # torch makes a state for every parameter before it loads.
    known = [list(state)]
    if sharded:
        torch.distributed.broadcast_object_list(known, src=0)
    for name, own in model.named_parameters():
        if name not in known[0]:
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
