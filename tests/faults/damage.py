"""Checkpoints that are damaged at random, or were made to deceive, and what a run makes of each."""

import copy
import hashlib
import json
import os
import random
import shutil
import struct
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from archzoo.training.build import build_model, build_task
from archzoo.training.checkpoint import CheckpointError, list_checkpoints, load_checkpoint
from archzoo.training.loop import Trainer
from archzoo.training.run import execute
from archzoo.training.saving import take_up
from tests.faults.support import run_folder, small_config

SLOW = 10.0  # seconds that count as a hang
FILES = ("training.safetensors", "best.safetensors", "ema.safetensors", "state.json", "manifest.json")


class Subject:
    """A run that was cut off, the trainer that would take it up, and a checkpoint of another run."""

    def __init__(self, folder: Path):
        for seed, width in ((0, 8), (1, 8), (2, 9)):
            config = small_config(folder, seed, eval_every=3)
            config.model["width"] = width
            looks = iter(range(100))
            execute(config, should_stop=lambda looks=looks: next(looks) == 5)
        runs = sorted(folder.glob("*/checkpoints"))
        self.run = run_folder(folder, eval_every=3)
        self.sound = list_checkpoints(self.run / "checkpoints")[0]
        self.others = [list_checkpoints(r)[0] for r in runs if r.parent != self.run]
        self.config = small_config(folder, eval_every=3)
        self.task = build_task(self.config)
        self.path = folder / "damaged" / self.sound.name
        self.tensors, self.state = load_checkpoint(self.sound)

    def fresh(self) -> Path:
        """A copy to be damaged."""
        shutil.rmtree(self.path.parent, ignore_errors=True)
        shutil.copytree(self.sound, self.path)
        return self.path

    def trainer(self) -> Trainer:
        return Trainer(self.config, self.task, build_model(self.config, self.task)[0])

    def verdict(self) -> str:
        """What a run makes of the copy: `refused`, `same`, `silent` (it loads, and is another), or an exception."""
        began = time.monotonic()
        try:
            tensors, state = load_checkpoint(self.path)
            take_up(self.trainer(), self.path, tensors, state, self.run.name)
        except CheckpointError as error:
            told = "refused" if str(self.path) in str(error) else f"refused without its name: {error}"
        except BaseException as error:  # that there is none is what is tested
            told = type(error).__name__
        else:
            told = "same" if state == self.state and _equal(tensors, self.tensors) else "silent"
        return "hung" if time.monotonic() - began > SLOW else told


def _equal(a: dict[str, dict[str, Tensor]], b: dict[str, dict[str, Tensor]]) -> bool:
    return a.keys() == b.keys() and all(
        a[k].keys() == b[k].keys() and all(_same(t, b[k][n]) for n, t in a[k].items()) for k in a
    )


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


# ---- bytes that went wrong: the manifest tells


def flip(subject: Subject, rng: random.Random) -> None:
    file = subject.path / rng.choice(FILES)
    content = bytearray(file.read_bytes())
    for _ in range(rng.choice((1, 1, 1, 8))):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def cut(subject: Subject, rng: random.Random) -> None:
    file = subject.path / rng.choice(FILES)
    content = file.read_bytes()
    file.write_bytes(content[: rng.choice((0, rng.randrange(len(content)), len(content) - 1))])


def zero(subject: Subject, rng: random.Random) -> None:
    file = subject.path / rng.choice(FILES)
    content = bytearray(file.read_bytes())
    start = rng.choice((0, rng.randrange(len(content))))
    content[start : start + 512] = bytes(len(content[start : start + 512]))
    file.write_bytes(content)


def grow(subject: Subject, rng: random.Random) -> None:
    with (subject.path / rng.choice(FILES[:-1])).open("ab") as file:
        file.write(rng.randbytes(rng.randrange(1, 600)))


def lose(subject: Subject, rng: random.Random) -> None:
    (subject.path / rng.choice(FILES)).unlink()


def swap(subject: Subject, rng: random.Random) -> None:
    """A file in the place of another: of this checkpoint, of one of another run, or of another layer."""
    name = rng.choice(FILES)
    source = rng.choice([subject.path, *subject.others]) / rng.choice(FILES)
    data = source.read_bytes()
    if data != (subject.path / name).read_bytes():
        (subject.path / name).write_bytes(data)


def replace(subject: Subject, rng: random.Random) -> None:
    """The whole checkpoint of another run, of the same layer or of one of another width."""
    shutil.rmtree(subject.path)
    shutil.copytree(rng.choice(subject.others), subject.path)


def odd_file(subject: Subject, rng: random.Random) -> None:
    """What is no file, has no end or no sense."""
    file = subject.path / rng.choice(FILES)
    file.unlink()
    kind = rng.randrange(6)
    if kind == 0:
        os.mkfifo(file)
    elif kind == 1:
        file.symlink_to("/dev/zero")
    elif kind == 2:
        file.mkdir()
    elif kind == 3:
        file.symlink_to(file.name)
    elif kind == 4:
        with file.open("wb") as sparse:
            sparse.truncate(1 << 40)
    else:
        file.write_bytes(rng.randbytes(300))


# ---- what a manifest that was made anew agrees with: the contents tell


def sign(path: Path) -> None:
    """Makes the manifest that these files would have."""
    manifest = json.loads((path / "manifest.json").read_text())
    for name in manifest["files"]:
        data = (path / name).read_bytes()
        manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))


def edit_header(subject: Subject, rng: random.Random) -> None:
    """A header of safetensors that says something else, signed."""
    file = subject.path / rng.choice(FILES[:3])
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    name = rng.choice(sorted(n for n in header if header[n]["shape"] and n != "__metadata__"))
    entry = header[name]
    kind = rng.randrange(10)
    if kind == 0:
        length = rng.choice((0, 1 << 40, 2**64 - 1, length + 8))
    elif kind == 1:
        entry["data_offsets"][1] = entry["data_offsets"][0] + (1 << 40)
    elif kind == 2:
        entry["shape"] = [1 << 38, *entry["shape"]]
    elif kind == 3:
        entry["shape"] = [*entry["shape"], 1]
    elif kind == 4:
        entry["dtype"] = rng.choice(("I32", "F8_E8M0", "F99", "U32", 7, None))
    elif kind == 5:
        entry["dtype"], entry["shape"] = "F16", [*entry["shape"][:-1], 2 * entry["shape"][-1]]
    elif kind == 6:
        header[f"{name}.more"] = header.pop(name)
    elif kind == 7:
        entry["shape"] = [-1]
    elif kind == 8:
        header = rng.choice(([], None, "x", {"a": 1}))
    else:
        entry["data_offsets"] = entry["data_offsets"][::-1]
    text = json.dumps(header).encode()
    if kind:
        length = len(text)
    file.write_bytes(struct.pack("<Q", length) + text + body)
    sign(subject.path)


def edit_state(subject: Subject, rng: random.Random) -> None:
    """A state.json without something, or with something of another type in its place, signed."""
    file = subject.path / "state.json"
    state = copy.deepcopy(subject.state)
    needed = ("step", "elapsed_s", "evaluations", "best", "optimizer", "random", "callbacks", "run_id", "format")
    kind = rng.randrange(6)
    if kind == 0:
        del state[rng.choice([key for key in needed if key != "format"])]
    elif kind == 1:
        state["step"] = rng.choice((-1, "5", 5.0, None, True, 10**30, [5]))
    elif kind == 2:
        state["random"] = rng.choice((None, {}, {**state["random"], "torch": "00"}, {**state["random"], "python": [3]}))
    elif kind == 3:
        state["optimizer"] = rng.choice((None, {}, {"state": {}, "param_groups": []}, {"state": 1, "param_groups": 2}))
    elif kind == 4:
        state["run_id"] = rng.choice((None, "0" * 10, 5))
    else:
        state["callbacks"] = rng.choice((None, [{}], 3))
    text = json.dumps(state)
    if rng.random() < 0.2:
        text = rng.choice(("[" * 100_000, "{}", "[]", "null", '"x"', "9" * 10_000, text[:-1], "\x00", "\ud800"))
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    sign(subject.path)


def edit_manifest(subject: Subject, rng: random.Random) -> None:
    """A manifest that says something else, which its own reader must see."""
    file = subject.path / "manifest.json"
    manifest = json.loads(file.read_text())
    name = rng.choice(FILES[:-1])
    entry = manifest["files"][name]
    kind = rng.randrange(9)
    if kind == 0:
        manifest["format"] = rng.choice((0, 2, 99, None, "1", 1.5, True, [1]))
    elif kind == 1:
        wrong = rng.choice(("../x", "/etc/passwd", "a/b", "", ".", "..", "x\x00y", "new.safetensors"))
        manifest["files"][wrong] = entry
    elif kind == 2:
        entry["bytes"] = rng.choice((0, -1, 1 << 40, 1e400, "7", None, True, 10**30))
    elif kind == 3:
        entry["sha256"] = rng.choice(("", "0" * 64, None, 5, [entry["sha256"]]))
    elif kind == 4:
        del manifest["files"][rng.choice(("training.safetensors", "state.json", "best.safetensors"))]
    elif kind == 5:
        del manifest[rng.choice(("format", "files"))]
    elif kind == 6:
        manifest["files"] = rng.choice((None, [], {}, "x", 3))
    elif kind == 7:
        manifest["files"][name] = rng.choice((None, [], {}, "x", 3, {"bytes": 1}))
    text = json.dumps(manifest)
    if kind == 8:
        text = rng.choice(("[" * 100_000, "null", "[]", text[:-1], text.upper(), " " * (2 << 20), "\x00"))
    file.write_text(text)


MUTATIONS: tuple[Callable[[Subject, random.Random], None], ...] = (
    *(flip, flip, flip, cut, zero, grow, lose, swap, replace, odd_file),
    *(edit_header, edit_header, edit_state, edit_manifest),
)


def damage(folder: Path, trials: int, seed: int = 0) -> tuple[Counter[str], list[str]]:
    """Verdicts over so many mutations, and what to know of those that are neither `refused` nor harmless."""
    subject = Subject(folder)
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    subject.fresh()
    assert subject.verdict() == "same", "a sound checkpoint loads"
    for trial in range(trials):
        mutation = MUTATIONS[trial % len(MUTATIONS)]
        subject.fresh()
        mutation(subject, random.Random(f"{seed}-{trial}"))
        verdict = subject.verdict()
        counts[verdict] += 1
        # In a manifest some bytes do not count, as white space and the version that is only told; a swap may be of like
        # with like.
        if verdict != "refused" and not (verdict == "same" and mutation in (flip, swap)):
            wrong.append(f"trial {trial}, {mutation.__name__}: {verdict}")
    return counts, wrong
