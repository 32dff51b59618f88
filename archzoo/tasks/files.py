"""Data files of a task: where they are looked for, how they are downloaded, and that they are what they should be."""

import hashlib
import http.client
import logging
import os
import secrets
import shlex
import stat
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from archzoo.tasks.task import DatasetError

VARIABLE = "ARCHZOO_DATA"
TIMEOUT = 10.0
"""Seconds that a server may be silent."""
DEADLINE = 600.0
"""Seconds that one download may take."""
MAX_BYTES = 2**28
"""More than any file of ours has: a server that sends more sends something else."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Source:
    """A data set that comes as files.

    Args:
        title: Its name, for messages.
        folder: Name of its folder in the data folder.
        mirrors: Addresses that the files' names are put behind; tried in this order.
        sha256: SHA-256 of every file, by the file's name.
    """

    title: str
    folder: str
    mirrors: tuple[str, ...]
    sha256: Mapping[str, str]


def data_root(data_dir: Path | str | None) -> Path:
    """The folder that holds every data set: `data_dir`, else $ARCHZOO_DATA, else `archzoo` in the user's cache.

    Raises:
        DatasetError: If the folder that was asked for does not exist; it may be misspelt, so it is not made.
    """
    given, asked = (data_dir, "data_dir") if data_dir else (os.environ.get(VARIABLE), VARIABLE)
    try:
        if not given:
            return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "archzoo"
        root = Path(given).expanduser()
    except RuntimeError:
        raise DatasetError(f"there is no home folder to keep data in; set {VARIABLE} to a folder") from None
    if not root.is_dir():
        raise DatasetError(f"{asked}={str(given)!r}: there is no such folder; make it, or name the one with the data")
    return root


def read_file(source: Source, name: str, data_dir: Path | str | None) -> bytes:
    """Content of one file of a data set, which is downloaded first where it is absent. Always what its SHA-256 says.

    Raises:
        DatasetError: If it is not to be had, or is not the right one.
    """
    path = data_root(data_dir) / source.folder / name
    remedy = f"delete it, and the next run downloads it again, or: {get_command(source, name, path)}"
    data = read_verified(source.title, path, source.sha256[name], remedy)
    return _download(source, name, path) if data is None else data


def read_verified(title: str, path: Path, sha256: str, remedy: str) -> bytes | None:
    """Content of a file that is what its SHA-256 says; None where there is none.

    Raises:
        DatasetError: If it cannot be read, or is another; it ends with the remedy.
    """
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            data = file.read() if size <= MAX_BYTES else b""
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DatasetError(f"{title}: cannot read {path}: {error}; {remedy}") from error
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise DatasetError(
            f"{title}: {path} is cut short, corrupted or another file ({size} bytes, SHA-256 {found}, should "
            f"be {sha256}); {remedy}"
        )
    return data


def open_file(path: Path) -> BinaryIO:
    """Opens a file to be read. Not a pipe or a device, which might never end.

    Raises:
        OSError: If it cannot be opened, or is no file.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError("it is not a file")
    return path.open("rb")


def get_command(source: Source, name: str, path: Path) -> str:
    """What gets one file of a data set, in a shell."""
    addresses = [mirror + name for mirror in source.mirrors[:1]]
    return shlex.join(["curl", "--location", "--create-dirs", "--output", str(path), *addresses])


def _download(source: Source, name: str, path: Path) -> bytes:
    """Downloads one file and puts it in its place; nothing unverified is ever written."""
    failures = []
    for url in (mirror + name for mirror in source.mirrors):
        log.info("%s: downloading %s to %s", source.title, url, path)
        try:
            data = _fetch(url)
        except (OSError, http.client.HTTPException) as error:
            failures.append(f"  {url}: {str(error) or type(error).__name__}")
            continue
        if hashlib.sha256(data).hexdigest() == source.sha256[name]:
            _publish(source, path, data)
            return data
        failures.append(f"  {url}: sent {len(data)} bytes that are not this file (wrong SHA-256)")
    raise DatasetError(
        f"{source.title}: there is no {path}, and it could not be downloaded:\n"
        + "\n".join(failures)
        + f"\nSet {VARIABLE} to the folder that holds {source.folder}/{name}, or get it where there is a network: "
        + get_command(source, name, path)
    )


def _fetch(url: str) -> bytes:
    """What an address holds. torch.hub's download would do, but it waits for a silent server for ever."""
    end = time.monotonic() + DEADLINE
    data = bytearray()
    with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
        while chunk := response.read1(2**16):
            data += chunk
            if time.monotonic() > end:
                raise TimeoutError(f"not done after {DEADLINE:g} s")
            if len(data) > MAX_BYTES:
                raise OSError(f"sends more than {MAX_BYTES} bytes")
    return bytes(data)


def _publish(source: Source, path: Path, data: bytes) -> None:
    try:
        write_whole(path, data)
    except OSError as error:
        raise DatasetError(
            f"{source.title}: cannot write {path}: {error}; set {VARIABLE} to a folder that can be written to"
        ) from error


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file so that others, and we after a crash, see the whole of it or nothing; its folder is made.

    Raises:
        OSError: If it cannot be written.
    """
    # In the same folder, for a rename is atomic only within a file system; under its own name, for several processes
    # may come together.
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with part.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
