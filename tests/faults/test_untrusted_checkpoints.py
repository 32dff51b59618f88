"""A checkpoint from a stranger runs no code and takes no memory beyond its size: it loads, or is a CheckpointError.

Pickles leave a file `canary` if anything unpickles them.
"""

import hashlib
import json
import os
import re
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from archzoo.hub import HubMixin
from archzoo.tasks.task import DatasetError
from archzoo.training.checkpoint import CheckpointError, load_checkpoint, load_tensors, save_checkpoint
from archzoo.training.config import ConfigError
from archzoo.training.run import execute, load_model
from tests.helpers import REPOSITORY
from tests.training.support import make_config

STATE = json.dumps({"format": 1, "step": 7}).encode()
SLACK = 2**20
"""Bytes of Python's own beside those of the file."""


def header(entries, data=b"", length=None):
    """A safetensors file with this header, as it is."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(shape, begin=0, end=4, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def pickles(canary):
    """Two pickles that make the canary: by a call, and as torch writes them."""
    call = b"cposix\nsystem\n(S'touch " + os.fsencode(canary) + b"'\ntR."
    return {"pickle": call, "pickle behind a header": header({"a": tensor([1])}, call), "archive": b"PK\x03\x04" + call}


WEIGHTS = {  # of model.safetensors
    "empty": b"",
    "seven bytes": b"\0" * 7,
    "a header of 2^63": header(b"", length=2**63),
    "a header of all bits": header(b"", length=2**64 - 1),
    "a header of 1 TB": header(b"{}", length=2**40),
    "a header of 90 MB": header(b"{}", length=90_000_000),
    "a shape of 1e18": header({"a": tensor([10**18])}, b"\0" * 4),
    "a shape that overflows": header({"a": tensor([2**32, 2**32])}, b"\0" * 4),
    "a negative shape": header({"a": tensor([-1])}, b"\0" * 4),
    "a shape of NaN": header(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', b"\0" * 4),
    "offsets behind the end": header({"a": tensor([2**30], end=2**32)}, b"\0" * 4),
    "offsets backwards": header({"a": tensor([1], begin=4, end=0)}, b"\0" * 4),
    "offsets that overlap": header({f"a{i}": tensor([2**18], end=2**20) for i in range(64)}, b"\0" * 2**20),
    "an unknown dtype": header({"a": tensor([1], dtype="PY_OBJECT")}, b"\0" * 4),
    "a header that is a list": header([1, 2]),
    "a header that is no UTF-8": header(b"\xff\xfe{}"),
    "a header of deep JSON": header(b'{"__metadata__":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001),
    "a name twice": header(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
        b"\0" * 8,
    ),
}
MANIFESTS = {  # of manifest.json
    "empty": b"",
    "a list": b"[]",
    "deep JSON": b"[" * 500_000,
    "a name above": {"../state.json": {"bytes": 1, "sha256": ""}},
    "an absolute name": {"/etc/passwd": {"bytes": 1, "sha256": ""}},
    "a name with a zero": {"a\0b": {"bytes": 1, "sha256": ""}},
    "an empty name": {"": {"bytes": 1, "sha256": ""}},
    "a huge size": {"model.safetensors": {"bytes": 10**30, "sha256": ""}},
    "a size of NaN": {"model.safetensors": {"bytes": float("nan"), "sha256": ""}},
    "a size that is text": {"model.safetensors": {"bytes": "1", "sha256": ""}},
    "names twice": b'{"format":1,"files":{"state.json":{"bytes":1,"sha256":""},"state.json":{"bytes":2,"sha256":""}}}',
    "ten million digits": b'{"format":' + b"9" * 10**6 + b"}",
    "more than a megabyte": b'{"a":"' + b"x" * 2**21 + b'"}',
}
STATES = {"deep": b"[" * 200_000, "text": b"hello", "a list": b"[]", "no step": b"{}", "a step of NaN": b'{"step":NaN}'}


def write(folder, files, manifest=None):
    """A checkpoint of these files, whose manifest is right unless another is given."""
    folder = folder / "step_00000007"
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    right = {name: {"bytes": len(d), "sha256": hashlib.sha256(d).hexdigest()} for name, d in files.items()}
    if not isinstance(manifest, bytes):
        listing = {"format": 1, "archzoo": "0.1.0", "files": right if manifest is None else manifest}
        manifest = json.dumps(listing).encode()
    (folder / "manifest.json").write_bytes(manifest)
    return folder


def peak(load, *arguments, expected=CheckpointError):
    """Bytes that the refusal took."""
    tracemalloc.start()
    try:
        with pytest.raises(expected):
            load(*arguments)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def total(folder):
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


@pytest.mark.parametrize("name", [*WEIGHTS, "pickle", "pickle behind a header", "archive"])
def test_weights_that_are_no_tensors_are_refused(name, tmp_path):
    data = (WEIGHTS | pickles(tmp_path / "canary"))[name]
    folder = write(tmp_path, {"state.json": STATE, "model.safetensors": data})
    assert peak(load_checkpoint, folder) <= 2 * total(folder) + SLACK
    assert peak(load_tensors, folder / "model.safetensors") <= 2 * len(data) + SLACK
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("name", list(MANIFESTS))
def test_a_manifest_that_lies_is_refused(name, tmp_path):
    folder = write(tmp_path, {"state.json": STATE, "model.safetensors": b"x"}, MANIFESTS[name])
    assert peak(load_checkpoint, folder) <= 2 * total(folder) + SLACK


@pytest.mark.parametrize("name", list(STATES))
def test_a_state_that_is_none_is_refused(name, tmp_path):
    peak(load_checkpoint, write(tmp_path, {"state.json": STATES[name]}))


@pytest.mark.parametrize("name", ["model.pt", "model.pkl", "model.bin", "state.json"])
def test_a_pickle_by_any_name_is_not_read(name, tmp_path):
    files = {"state.json": STATE} | {name: pickles(tmp_path / "canary")["pickle"]}
    folder = write(tmp_path, files)
    if name == "state.json":
        peak(load_checkpoint, folder)
    else:
        assert load_checkpoint(folder)[0] == {}, "only .safetensors hold tensors"
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("target", ["/dev/zero", "fifo", "folder"])
def test_what_is_no_file_is_not_waited_for(target, tmp_path):
    folder = write(tmp_path, {"state.json": STATE, "model.safetensors": b"x"})
    (folder / "model.safetensors").unlink()
    if target == "fifo":
        os.mkfifo(folder / "model.safetensors")
    elif target == "folder":
        (folder / "model.safetensors").mkdir()
    else:
        (folder / "model.safetensors").symlink_to(target)
    assert peak(load_checkpoint, folder) < SLACK
    assert peak(load_tensors, folder / "model.safetensors") < SLACK


def test_a_sparse_file_of_a_terabyte_takes_no_room(tmp_path):
    folder = write(tmp_path, {"state.json": STATE, "model.safetensors": b"x"})
    with (folder / "model.safetensors").open("wb") as file:
        file.truncate(2**43)
    assert peak(load_checkpoint, folder) < SLACK
    assert peak(load_tensors, folder / "model.safetensors") < SLACK


def test_a_sound_checkpoint_takes_twice_its_size(tmp_path):
    tensors = {"model": {"a": torch.zeros(2**20)}}
    folder = save_checkpoint(tmp_path, 7, tensors, {}, keep=1)
    tracemalloc.start()
    loaded, state = load_checkpoint(folder)
    taken = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (loaded["model"]["a"].shape, state["step"]) == ((2**20,), 7)
    assert taken <= 2 * total(folder) + SLACK


def test_there_are_thirty_files_and_more():
    assert len(WEIGHTS) + len(MANIFESTS) + len(STATES) + 4 + 4 >= 30


# ---- a run's folder, and a model from the Hub


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run that is done."""
    root = tmp_path_factory.mktemp("run")
    record = execute(make_config(root, trainer={"steps": 1}, model={"name": "mlp", "width": 4}))
    assert record["status"] == "done", record["error"]
    return root / record["run_id"]


def deep(depth):
    value = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("change", "expected", "words"),
    [
        ({"status": None}, CheckpointError, "status None"),
        ({"config": None}, ConfigError, "task.name: missing"),
        ({"config": {"task": {"_target_": "os.system"}}}, ConfigError, "task._target_: a configuration cannot name"),
        ({"config": {"nothing": 1}}, ConfigError, "nothing: there is no such key"),
        ({"model": {"width": 10**9}}, ConfigError, "model.width=1000000000, layer=linear: "),
        ({"model": {"depth": 10**9}}, ConfigError, "model.depth=1000000000: "),
        ({"model": {"width": 8}}, CheckpointError, "cannot be loaded"),
        ({"model": {"head": "../evil"}}, ConfigError, "head='../evil'"),
        (
            {"callbacks": {"grid_refine": {"sizes": [3, 5], "at": [0.3, 0.5]}}, "structure": 1},
            CheckpointError,
            "cannot be loaded",
        ),
        ({"task": {"name": "chess_moves", "path": "/dev/zero"}}, (ConfigError, DatasetError), "chess"),
    ],
)
def test_a_run_of_a_stranger_is_refused_by_name(change, expected, words, finished, tmp_path):
    record = json.loads((finished / "run.json").read_text())
    for part in ("model", "task", "callbacks"):
        if part in change:
            record["config"][part] = record["config"][part] | change[part]
    record |= {key: change[key] for key in ("status", "config") if key in change}
    if "structure" in change:
        record["structure"] = {"callbacks": {"grid_refine": deep(5)}}
    (tmp_path / "run.json").write_text(json.dumps(record))
    (tmp_path / "model.safetensors").write_bytes((finished / "model.safetensors").read_bytes())
    with pytest.raises(expected, match=re.escape(words)):
        load_model(tmp_path)


class Net(nn.Module, HubMixin):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)


def test_a_model_of_the_hub_is_never_unpickled(tmp_path):
    Net().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(pickles(tmp_path / "canary")["pickle"])
    with pytest.raises(Exception, match="safetensors"):
        Net.from_pretrained(tmp_path)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("swaps", [[1], [{"rules": 1}], [{"rules": {"fc": "os.system"}}], [{"rules": {"": "kan"}}]])
def test_what_a_model_of_the_hub_swaps_is_a_layer_or_refused(swaps, tmp_path):
    Net().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"archzoo_swaps": swaps}))
    with pytest.raises(ValueError, match="rules|os.system"):
        Net.from_pretrained(tmp_path)


# ---- the source

DANGEROUS = re.compile(
    r"\bpickle\b|weights_only\s*=\s*False|allow_pickle\s*=\s*True|(?<![\w.`])(?:eval|exec)\(|yaml\.(?:load|full_load|"
    r"unsafe_load)\b|torch\.load\(|joblib\.load|marshal\.load|shelve\.open|shell\s*=\s*True|os\.(?:system|popen)\(|"
    r"sympify\(|hydra\.utils|instantiate\(|trust_remote_code"
)
ALLOWED = {  # file -> text of the line, and why it is there
    "archzoo/models/mamba_lm.py": {
        'torch.load(weights, map_location="cpu", weights_only=True)': "as Mamba's authors publish them; it builds "
        "tensors and calls nothing else"
    },
    "archzoo/models/from_timm.py": {"a pickle may run code": "says so in a refusal"},
    "archzoo/models/from_transformers.py": {"trust_remote_code": "is refused"},
    "archzoo/models/kan_formula.py": {"sympy.sympify, values": "of numbers and sympy's own terms, never of text"},
    "archzoo/models/symbolic_rounding.py": {"sympy.sympify(expr)": "of sympy's own terms"},
    "archzoo/models/symbolic.py": {"sympy.sympify(inputs[i])": "of the caller's symbols; no configuration has any"},
    "archzoo/hub.py": {"is a pickle, which could run code": "says so in a refusal"},
}


def test_nothing_in_the_source_runs_what_it_reads():
    hits = []
    for folder in ("archzoo", "kernels", "train.py"):
        paths = [REPOSITORY / folder] if folder.endswith(".py") else sorted((REPOSITORY / folder).rglob("*.py"))
        for path in paths:
            name = str(path.relative_to(REPOSITORY))
            for number, line in enumerate(path.read_text().splitlines(), 1):
                if DANGEROUS.search(line) and not any(text in line for text in ALLOWED.get(name, {})):
                    hits.append(f"{name}:{number}: {line.strip()}")
    assert not hits, "explain each in ALLOWED, or take it out:\n" + "\n".join(hits)


def test_what_is_allowed_is_there():
    for name, texts in ALLOWED.items():
        source = Path(REPOSITORY / name).read_text()
        assert all(text in source for text in texts), f"{name}: take out of ALLOWED what is not there any more"


def test_numpy_files_are_read_without_pickles(tmp_path):
    """numpy's default, on which we rely nowhere: every call says so."""
    calls = [
        line.strip()
        for path in (REPOSITORY / "archzoo").rglob("*.py")
        for line in path.read_text().splitlines()
        if re.search(r"\bnp\.load\(", line)
    ]
    assert calls
    assert all("allow_pickle=False" in line for line in calls)
    np.save(tmp_path / "evil.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        np.load(tmp_path / "evil.npy", allow_pickle=False)
