"""Where a run writes, when the place fails: files of lines, the log, and the streams of the command.

A full disk, a closed terminal or a reader that has gone costs what is shown, never what is trained.
"""

import contextlib
import errno
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from typing_extensions import override

log = logging.getLogger("archzoo")
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
"""Faults of the place that is written to: with another place, or room in it, the same command goes on."""


class Lines:
    """Appends JSON lines to a file. Lines that cannot be written wait, and go before the next; the file is never torn.

    Args:
        path: The file, made with its first line; a torn last line, as a lost machine leaves, is cut off.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file: IO[bytes] | None = None
        self._size = 0  # bytes of whole lines
        self._waiting = b""
        self._told = False

    def write(self, line: dict[str, Any]) -> None:
        """Appends a line. Where that fails, it is said once."""
        self._waiting += json.dumps(line).encode() + b"\n"
        try:
            self._flush()
        except OSError as error:
            if not self._told:
                log.warning("%s: cannot be written (%s); its lines wait in memory", self.path, error.strerror)
            self._told = True

    def sync(self) -> int:
        """Makes all lines durable, and returns the file's size.

        Raises:
            OSError: If there is a line that cannot be written.
        """
        self._flush()
        if self._file is not None:
            os.fsync(self._file.fileno())
        return self._size

    def close(self) -> None:
        """Closes the file; what still waits is lost, and that is said."""
        if self._waiting:
            log.warning("%s: %d lines were not written", self.path, self._waiting.count(b"\n"))
        if self._file is not None:
            self._file.close()
            self._file = None

    def _flush(self) -> None:
        if self._file is None and (self._waiting or self.path.exists()):
            self._file = self.path.open("a+b", buffering=0)
            self._size = _end_of_lines(self._file)
            self._file.truncate(self._size)
        if self._file is None or not self._waiting:
            return
        view = memoryview(self._waiting)
        try:
            while view:
                view = view[self._file.write(view) :]
        except OSError:
            self._file.truncate(self._size)
            raise
        self._size += len(self._waiting)
        self._waiting, self._told = b"", False


def _end_of_lines(file: IO[bytes]) -> int:
    """Size of a file up to its last line break, and 0 of what is no file."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - (1 << 16))
        file.seek(start)
        if (found := file.read(end - start).rfind(b"\n")) >= 0:
            return start + found + 1
        end = start
    return 0


class LogFile(logging.FileHandler):
    """A log in UTF-8. A line that cannot be written is left out, and the first of them is said on stderr."""

    def __init__(self, path: Path):
        super().__init__(path, encoding="utf-8")
        self.told = False
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))

    @override
    def handleError(self, record: logging.LogRecord) -> None:
        if not self.told:
            self.told = True
            say(f"warning: {self.baseFilename}: cannot be written ({sys.exc_info()[1]}); lines are left out")

    @override
    def close(self) -> None:
        with contextlib.suppress(OSError):  # what it could not write before
            super().close()


class Told(logging.Handler):
    """Hands the warnings of a run to whom is watching, each as one line."""

    def __init__(self, tell: Callable[[str], None]):
        super().__init__(logging.WARNING)
        self.tell = tell
        self.addFilter(lambda record: record.levelno == logging.WARNING)  # errors are told as the run's outcome

    @override
    def emit(self, record: logging.LogRecord) -> None:
        self.tell(record.getMessage().partition("\n")[0])


def say(text: str) -> None:
    """A line on stderr, as far as it can be written. Takes no lock, so that a signal's handler may call it."""
    with contextlib.suppress(OSError, ValueError):
        os.write(2, f"{text}\n".encode())


class _Stream:
    """A text stream whose first failure is said on stderr, and whose output goes nowhere from then on."""

    def __init__(self, stream: IO[str]):
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except (OSError, ValueError) as error:  # ValueError: it is closed
            self._drop(error)
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except (OSError, ValueError) as error:
            self._drop(error)

    def _drop(self, error: Exception) -> None:
        # `| head` has seen what it wanted, and who closes a stream knows it.
        if not isinstance(error, BrokenPipeError | ValueError):
            say(f"warning: {self.stream.name}: cannot be written ({error}); the run folder has it all")
        with contextlib.suppress(OSError, ValueError):  # what it still holds is flushed at exit
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)


@contextlib.contextmanager
def guarded_streams() -> Iterator[None]:
    """Inside, what is printed can neither fail nor end up in a file that is opened later.

    A standard stream that is closed is opened on nothing, for the next file would get its number. Characters that a
    stream's encoding does not have are printed as escapes.
    """
    with contextlib.suppress(OSError):
        while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:
            os.set_inheritable(handle, True)
        os.close(handle)
    before = sys.stdout, sys.stderr
    guarded: list[_Stream] = []
    for stream in before:
        if stream is None:  # it was closed when the interpreter started
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115 - lives as long as the process
        if not isinstance(stream, _Stream):
            if callable(reconfigure := getattr(stream, "reconfigure", None)):
                reconfigure(errors="backslashreplace")
            stream = _Stream(stream)
        guarded.append(stream)
    sys.stdout, sys.stderr = guarded
    try:
        yield
    finally:
        for stream in guarded:
            stream.flush()
        sys.stdout, sys.stderr = before
