"""Data that goes wrong: what tests/faults/ and `python -m benchmarks data_faults` try."""

import functools
import gzip
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import random
import signal
import struct
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from unittest import mock

import numpy as np
import torch
from safetensors.torch import load_file
from torch.utils.data import Dataset

from archzoo.tasks import cifar10, fashion_mnist, idx, mnist, text
from archzoo.tasks.files import VARIABLE, Source
from archzoo.tasks.task import DatasetError, Task, tasks
from archzoo.training import run, run_folder
from archzoo.training.checkpoint import list_checkpoints
from archzoo.training.config import BudgetConfig, OptimizerConfig, TrackerConfig, TrainConfig, TrainerConfig
from archzoo.training.data import BatchOrder

STEPS = 40


class Noisy(Dataset[Any]):
    """Examples of a split, read one by one, with noise that is drawn as they are read. `fault` sees every number."""

    def __init__(self, split: Dataset[Any], fault: Callable[[int], None]):
        self.split, self.fault = split, fault

    def __len__(self) -> int:
        return len(self.split)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        self.fault(index)
        inputs, target = self.split[index]
        return inputs + 0.01 * torch.randn(inputs.shape), target


@contextmanager
def noisy_data(fault: Callable[[int], None] = lambda index: None, split: str = "train") -> Iterator[None]:
    """Runs read a split of theirs through `Noisy`."""
    build = run.build_task

    def build_noisy(config: TrainConfig) -> Task:
        task = tasks.create(config.task["name"])
        setattr(task, split, Noisy(getattr(task, split), fault))
        return task

    run.build_task = build_noisy
    try:
        yield
    finally:
        run.build_task = build


def config_of(folder: Path, workers: int, **trainer: Any) -> TrainConfig:
    """Forty steps with dropout, an evaluation every eight, and checkpoints less often than that."""
    options = {"steps": STEPS, "batch_size": 16, "log_every": 1, "eval_every": 8, "checkpoint_every": 16}
    return TrainConfig(
        name="faults",
        output_dir=str(folder),
        task={"name": "digits"},
        model={"name": "mlp", "width": 8, "depth": 2, "dropout": 0.2},
        layer={"name": "linear"},
        budget=BudgetConfig(match="none"),
        optimizer=OptimizerConfig(lr=1e-2),
        trainer=TrainerConfig(**{**options, "workers": workers, **trainer}),
        tracker=TrackerConfig(wandb="disabled", pictures=False),
    )


def folder_of(config: TrainConfig) -> Path:
    return run_folder.RunFolder(Path(config.output_dir), config).path


def saved_steps(config: TrainConfig) -> list[int]:
    """Steps of the checkpoints that a run has, the newest first."""
    return [int(path.name.removeprefix("step_")) for path in list_checkpoints(folder_of(config) / "checkpoints")]


def same_run(a: TrainConfig, b: TrainConfig) -> bool:
    """Whether two runs have the same final weights and metrics, to the bit."""
    first, second = folder_of(a), folder_of(b)
    ours, theirs = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    same = ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)
    return same and _lines(first) == _lines(second)


def _lines(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without what a clock wrote."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("time_s", "train_s")} for line in lines]


def kill_a_worker_at(step: int, rng: random.Random) -> Callable[[], bool]:
    """To be given as `should_stop`, which is called once a step: kills a loader process at that step.

    Up to 3 ms later, that is, whatever it and the main process are doing then; 6 steps later at most.
    """
    steps = iter(range(1, STEPS + 1))

    def kill() -> None:
        time.sleep(rng.uniform(0.0, 0.003))
        os.kill(rng.choice(processes).pid or 0, signal.SIGKILL)

    killer = threading.Thread(target=kill)

    def look() -> bool:
        now = next(steps)
        if now == step:
            processes[:] = multiprocessing.active_children()
            killer.start()
        if now == step + 6:
            killer.join()
        return False

    processes: list[Any] = []
    return look


def bad_example(batch: int) -> int:
    """An example that is first read in that batch, the first being number 0."""
    order = BatchOrder(len(tasks.create("digits").train), 16, seed=0)  # type: ignore[arg-type]
    return list(itertools.islice(order, batch + 1))[batch][5]


class Fault:
    """Breaks one example for as long as `broken`, which loader processes that have started do not hear of.

    Args:
        index: Number of the example.
    """

    def __init__(self, index: int):
        self.index, self.broken = index, True

    def __call__(self, index: int) -> None:
        if self.broken and index == self.index:
            raise ValueError("not a picture")


@dataclass
class Outcome:
    """How a run went that failed, and went on.

    Attributes:
        error: What it said.
        saved: Newest checkpoint's step when it had failed.
        same: Whether it ended with the bits of an undisturbed run.
        seconds: From its start to its end, both times together.
    """

    error: str
    saved: int
    same: bool
    seconds: float


def disturbed(
    config: TrainConfig, undisturbed: TrainConfig, fault: Fault | None = None, split: str = "train", **options: Any
) -> Outcome:
    """Runs until it fails, by a fault or by what the options do; mends the fault, and lets the run go on."""
    began = time.monotonic()
    with noisy_data(fault or (lambda index: None), split):
        failed = run.execute(config, **options)
        if failed["status"] != "failed":
            raise RuntimeError(f"it should have failed: {failed['status']}")
        saved = next(iter(saved_steps(config)), 0)
        if fault is not None:
            fault.broken = False
        config.sweep.retry_failed = True
        done = run.execute(config)
    same = done["status"] == "done" and same_run(config, undisturbed)
    log = (folder_of(config) / "log.txt").read_text()
    went_on = not saved or f"resumed from step_{saved:08d}" in log
    return Outcome(failed["error"], saved, same and went_on, time.monotonic() - began)


def whole(config: TrainConfig, split: str = "train") -> TrainConfig:
    """The same run without a fault."""
    with noisy_data(split=split):
        if (record := run.execute(config))["status"] != "done":
            raise RuntimeError(record["error"])
    return config


# ---- files


def damages(good: bytes, other: bytes) -> dict[str, Callable[[Path], object]]:
    """What can be wrong with a file, by name; each is done to a path where nothing is yet."""
    half = len(good) // 2
    return {
        "empty": lambda path: path.write_bytes(b""),
        "truncated": lambda path: path.write_bytes(good[:-1]),
        "half": lambda path: path.write_bytes(good[:half]),
        "longer": lambda path: path.write_bytes(good + b"\0"),
        "flipped": lambda path: path.write_bytes(flipped(good, half, 3)),
        "another file": lambda path: path.write_bytes(other),
        "a page": lambda path: path.write_bytes(b"<!DOCTYPE html><title>404 Not Found</title>"),
        "a folder": lambda path: path.mkdir(),
        "a pipe": os.mkfifo,
        "a link to itself": lambda path: path.symlink_to(path.name),
        "endless": lambda path: path.symlink_to("/dev/zero"),
        "huge": lambda path: (path.touch(), os.truncate(path, 2**40)),  # sparse: it takes no room
    }


def flipped(data: bytes, place: int, bit: int) -> bytes:
    """The data with one bit turned over."""
    return data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]


def evil_tar(names: dict[str, bytes], links: dict[str, str]) -> bytes:
    """A gzipped tar file whose members may have any name, and its links any target."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, target in links.items():
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, target
            tar.addfile(link)
        for name, data in names.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def evil_zip(names: dict[str, bytes]) -> bytes:
    """A zip file, which an npz file is, whose members may have any name."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in names.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def archives(target: Path) -> dict[str, bytes]:
    """Archives that would write to the target if they were extracted somewhere."""
    up = "../" * 20 + str(target).lstrip("/")
    return {
        "a tar that climbs": evil_tar({up: b"x", "../evil.bin": b"x"}, {}),
        "a tar from the root": evil_tar({str(target): b"x"}, {}),
        "a tar with a link": evil_tar({"link/evil.bin": b"x"}, {"link": str(target.parent), "data_batch_1.bin": up}),
        "a zip that climbs": evil_zip({up: b"x", "../evil.npy": b"x"}),
        "a zip from the root": evil_zip({str(target): b"x"}),
        "a zip with other names": evil_zip({"images.npy": b"x"}),
    }


PLAIN = b"First Citizen:\nBefore we proceed any further, hear me speak.\n" * 99
READERS: list[tuple[str, dict[str, Any], Source, str]] = [
    ("mnist", {}, mnist.SOURCE, idx.FILES[0]),
    ("mnist", {}, mnist.SOURCE, idx.FILES[3]),
    ("fashion_mnist", {}, fashion_mnist.SOURCE, idx.FILES[1]),
    ("multi_mnist", {}, mnist.SOURCE, idx.FILES[2]),
    ("mnist_arithmetic", {}, mnist.SOURCE, idx.FILES[0]),
    ("autoencoding", {"dataset": "mnist"}, mnist.SOURCE, idx.FILES[2]),
    ("autoencoding", {"dataset": "cifar10"}, cifar10.SOURCE, cifar10.PACKED),
    ("idempotent", {"dataset": "fashion_mnist"}, fashion_mnist.SOURCE, idx.FILES[0]),
    ("flow_matching", {"dataset": "mnist"}, mnist.SOURCE, idx.FILES[1]),
    ("super_resolution", {"dataset": "fashion_mnist"}, fashion_mnist.SOURCE, idx.FILES[2]),
    ("cifar10", {}, cifar10.SOURCE, cifar10.ARCHIVE),
    ("cifar10", {}, cifar10.SOURCE, cifar10.PACKED),
    ("text", {}, text.SOURCE, text.FILE),
    ("char_lm", {"corpus": "shakespeare"}, text.SOURCE, text.FILE),
]
"""What each task reads: the task, its options, the source, and a file of it."""


def image_files() -> dict[str, bytes]:
    """Files as MNIST's, of forty images and ten."""
    rng, files = np.random.RandomState(0), []
    for count in (40, 10):
        for array in (rng.randint(0, 256, (count, 28, 28)), np.arange(count) % 10):
            head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
            files.append(gzip.compress(head + array.astype(np.uint8).tobytes(), mtime=0))
    return dict(zip(idx.FILES, files, strict=True))


@contextmanager
def small_sets() -> Iterator[dict[str, dict[str, bytes]]]:
    """Small files stand in for those that tasks read, and a proxy that refuses for the network.

    Gives the files by the title of their source.
    """
    images = image_files()
    contents = [(mnist.SOURCE, images), (fashion_mnist.SOURCE, images), (text.SOURCE, {text.FILE: PLAIN})]
    proxies = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")
    variables = {"no_proxy": "", "NO_PROXY": "", **dict.fromkeys(proxies, "http://127.0.0.1:9")}
    with ExitStack() as stack:
        for source, files in contents:
            digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
            stack.enter_context(mock.patch.dict(cast(Any, source.sha256), digests))
        stack.enter_context(mock.patch.dict(os.environ, variables))
        os.environ.pop(VARIABLE, None)  # put back by the patch
        yield {source.title: files for source, files in contents}


@dataclass
class Refusal:
    """What a task said of a broken file.

    Attributes:
        kind: How it was broken.
        error: What was raised; None if nothing was.
        helps: Whether that is a DatasetError with the data set's name, the path, and the command that gets it.
        changed: Paths that the task made or changed.
        seconds: How long it took.
    """

    kind: str
    error: Exception | None
    helps: bool
    changed: set[Path]
    seconds: float


def refusals(root: Path, contents: dict[str, dict[str, bytes]], reader: Any) -> Iterator[Refusal]:
    """Breaks a file in every way; the others of its set are sound.

    Args:
        root: An empty folder.
        contents: Of `small_sets`.
        reader: One of `READERS`.
    """
    task, options, source, name = reader
    folder = root / "data" / source.folder
    folder.mkdir(parents=True)
    good = contents.get(source.title, {})
    for other, data in good.items():
        (folder / other).write_bytes(data)
    kinds = damages(good.get(name, PLAIN), b"another file of a set")
    for kind, data in archives(root / "outside" / "evil").items():
        kinds[kind] = functools.partial(Path.write_bytes, data=data)
    for kind, damage in {**kinds, "missing": lambda path: None}.items():
        path = folder / name
        path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
        damage(path)
        before, began, error = below(root), time.monotonic(), None
        try:
            tasks.create(task, data_dir=root / "data", **options)
        except Exception as raised:  # any but a DatasetError is counted as unclear
            error = raised
        if kind == "missing" and name == cifar10.PACKED:  # then the official archive is looked for
            path = folder / cifar10.ARCHIVE
        wanted = (source.title, str(path), "curl --location --create-dirs --output")
        helps = isinstance(error, DatasetError) and all(part in str(error) for part in wanted)
        changed = {path for path, _ in below(root).items() ^ before.items()}
        yield Refusal(kind, error, helps, changed, time.monotonic() - began)


def below(folder: Path) -> dict[Path, tuple[int, int]]:
    """Everything below a folder, with sizes and times."""
    return {path: (stat.st_size, stat.st_mtime_ns) for path in folder.rglob("*") if (stat := path.lstat())}
