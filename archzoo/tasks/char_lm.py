"""Language modelling over bytes: the sources of Python's standard library, 12 MB on every machine, or Tiny Shakespeare.

A corpus lies in a file that is mapped into memory, and a window is read when it is asked for.
"""

import functools
import hashlib
import logging
import os
import platform
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from archzoo.tasks.files import VARIABLE, data_root, read_file, write_whole
from archzoo.tasks.language import LONGEST, LanguageTask
from archzoo.tasks.options import choice, whole_number
from archzoo.tasks.task import DatasetError, register_task
from archzoo.tasks.text import FILE, SOURCE, cuts

FOLDER = "char_lm"
"""In the data folder: where corpora that are put together here are kept."""
NO_SOURCES = {"__pycache__", "idle_test", "site-packages", "dist-packages", "test", "tests"}
"""Folders whose files are tests, or none of the standard library's."""

log = logging.getLogger(__name__)


@register_task("char_lm")
class CharLM(LanguageTask):
    """The next byte of a text, at every position of a window; scored in bits a byte.

    Corpus `python`: every source file of the modules that the running Python calls its standard library
    (`sys.stdlib_module_names`), tests left out, and of files that are alike all but one. Files come in the order of the
    SHA-256 of their names; those that begin in the first 90 % of the bytes are for training, in the next 5 % for
    validation, in the last 5 % for testing, so that no file is in two parts. Resembling files may be, as the tables of
    `encodings`: compare models with each other. Another Python has another corpus, which the run's record names. All
    256 bytes are tokens.

    Corpus `shakespeare`: the text of task `text`, cut at the same places; its 65 distinct bytes are the tokens.

    Validation and test windows lie side by side, and every position of a window counts alike: the first ones have
    little text to go by. Compare at equal contexts.

    Args:
        corpus: `"python"` or `"shakespeare"`.
        context: Bytes of a window.
        stride: Bytes from the start of a training window to that of the next. None: context, so that windows lie side
            by side and an epoch reads the text once; 1: every place starts a window.
        max_bytes: Keep so many bytes of the corpus at most: of each part the beginning, by the same factor. None: all.
        data_dir: Folder that holds the corpus, as `char_lm/python-3.11.7-….bin`, written there where absent, or as
            `tinyshakespeare.txt`, downloaded there where absent. None: the folder that the environment variable
            ARCHZOO_DATA names, else `archzoo` in the user's cache. Where it cannot be written to, or is marked as
            read-only, the Python corpus stays in memory.
        seed: Not needed: the split is the same in every run.

    Attributes:
        sha256: Of the whole corpus, in the order training, validation, test.
        sizes: Bytes that are kept of each of the three parts.

    Raises:
        DatasetError: If a file is not to be had, or is another; if Python came without its sources.
        ValueError: If an option is out of range, or a part is shorter than a window.
    """

    score = "bits_per_byte"

    def __init__(
        self,
        *,
        corpus: Literal["python", "shakespeare"] = "python",
        context: int = 128,
        stride: int | None = None,
        max_bytes: int | None = None,
        data_dir: Path | None = None,
        seed: int = 0,
    ):
        super().__init__(data_dir=data_dir, seed=seed)
        choice("corpus", corpus, ("python", "shakespeare"))
        whole_number("context", context, 1, LONGEST)
        if stride is not None:
            whole_number("stride", stride, 1, LONGEST)
        if max_bytes is not None:
            whole_number("max_bytes", max_bytes, 1, 2**40)
        self.corpus = corpus
        if corpus == "python":
            data, ends = python_corpus()
            self.vocabulary = bytes(range(256))
        else:
            data = read_file(SOURCE, FILE, data_dir)
            ends = cuts(len(data))
            self.vocabulary = bytes(sorted(set(data)))
        self.sha256 = hashlib.sha256(data).hexdigest()
        self.input_shape, self.output_size = (context,), len(self.vocabulary)
        whole = self._cached(data) if corpus == "python" else _map(data_root(data_dir) / FILE, len(data))
        kept = min(max_bytes or len(data), len(data))
        parts = [part[: len(part) * kept // len(data)] for part in whole.tensor_split(ends)]
        self.sizes = [len(part) for part in parts]
        if min(self.sizes) <= context:
            raise ValueError(
                f"context={context}, max_bytes={max_bytes}: a window of {context + 1} bytes does not fit into parts of "
                f"{', '.join(map(str, self.sizes))} bytes; choose a shorter context, or more bytes"
            )
        ids = None if corpus == "python" else self._ids
        strides = (stride or context, context, context)
        self.train, self.val, self.test = (
            ByteWindows(part, ids, context, step) for part, step in zip(parts, strides, strict=True)
        )

    def _cached(self, data: bytes) -> Tensor:
        """The bytes, mapped from a file of the data folder, which is written where it is absent or another."""
        path = data_root(self.data_dir) / FOLDER / f"python-{platform.python_version()}-{self.sha256[:16]}.bin"
        try:
            if path.exists():
                with path.open("rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() == self.sha256:
                        return _map(path, len(data))
                log.warning("%s is cut short or corrupted; it is written again", path)
            _refuse_read_only(path)
            write_whole(path, data)
            return _map(path, len(data))
        except OSError as error:
            _say_once(f"{error}; the corpus is held in memory. Set {VARIABLE} to a folder that can be written to")
            return torch.frombuffer(bytearray(data), dtype=torch.uint8)

    def summarize(self, evaluations: Sequence[Mapping[str, float]], model: nn.Module) -> dict[str, Any]:
        """Which bytes they were: `corpus`, `corpus_sha256`, `corpus_bytes` of the three parts, and `python`."""
        told = {"corpus": self.corpus, "corpus_sha256": self.sha256, "corpus_bytes": self.sizes}
        version = f"{platform.python_implementation()} {platform.python_version()}"
        return told | ({"python": version} if self.corpus == "python" else {})


class ByteWindows(Dataset[tuple[Tensor, Tensor]]):
    """Windows of a text and of what is one place further, as ids: read when they are asked for.

    Args:
        data: The text, (bytes,), uint8; it may be mapped from a file.
        ids: The id of each byte (256,); None: its value.
        context: Length of a window.
        stride: From one window to the next.
    """

    def __init__(self, data: Tensor, ids: Tensor | None, context: int, stride: int):
        self.ids, self.windows = ids, data.unfold(0, context + 1, stride)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, targets = self.__getitems__([index])
        return inputs[0], targets[0]

    def __getitems__(self, indices: list[int] | Tensor) -> tuple[Tensor, Tensor]:
        rows = self.windows[indices].long()
        if self.ids is not None:
            rows = self.ids[rows]
        return rows[:, :-1], rows[:, 1:]


def python_corpus(root: Path | None = None) -> tuple[bytes, list[int]]:
    """The sources of the standard library one after the other, and where those for validation and for testing begin.

    Args:
        root: Folder of the library; by default that of the running Python.

    Raises:
        DatasetError: If it holds none, or one of them cannot be read.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    try:
        sources = [(root / name).read_bytes() for name in sorted(_names(root), key=_shuffled)]
    except OSError as error:
        raise DatasetError(f"corpus=python: cannot read {error.filename}: {error}") from error
    files = [data for data in dict.fromkeys(sources) if data]
    total, begin = sum(map(len, files)), 0
    if not total:
        raise DatasetError(f"corpus=python: {root} holds no sources of the standard library; use corpus=shakespeare")
    begins, limits = [], cuts(total)
    for data in files:
        begins.append(begin)
        begin += len(data)
    ends = [next((begin for begin in begins if begin >= limit), total) for limit in limits]
    return b"".join(files), ends


def _names(root: Path) -> list[str]:
    """Names of the library's files below its folder, with slashes."""
    names = []
    for folder, inner, files in os.walk(root):
        inner[:] = [name for name in inner if name not in NO_SOURCES]  # os.walk does not enter the others
        here = Path(folder).relative_to(root)
        names += [(here / name).as_posix() for name in files if name.endswith(".py")]
    # What else is there was written for this machine, as _sysconfigdata_….py, or put there by a distribution.
    return [name for name in names if name.split("/")[0].removesuffix(".py") in sys.stdlib_module_names]


def _shuffled(name: str) -> bytes:
    """Puts names in an order that is the same everywhere, and has nothing to do with what they name."""
    return hashlib.sha256(name.encode()).digest()


def _map(path: Path, size: int) -> Tensor:
    return torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)


def _refuse_read_only(path: Path) -> None:
    """Keeps root, who may write everywhere, out of a folder that is marked as read-only."""
    folder = next((parent for parent in path.parents if parent.exists()), path.parent)
    if not folder.stat().st_mode & 0o222:
        raise PermissionError(f"{folder} is marked as read-only")


@functools.cache
def _say_once(text: str) -> None:
    log.warning("%s", text)
