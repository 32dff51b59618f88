"""Files that are there whole or not at all, and that are a comparison's own: its folder may come from anyone."""

import errno
import os
from pathlib import Path


def read_own(path: Path, root: Path, most: int = 2**31) -> bytes:
    """Bytes of a file inside a folder, at most so many.

    Raises:
        OSError: If it is not there, is reached by a link that leads out of the folder, is no regular file, as a pipe is
            which would be waited for, or is larger than 2 GiB.
    """
    real = path.resolve(strict=True)
    if not real.is_relative_to(root.resolve()):
        raise OSError(errno.EXDEV, f"leads out of {root.name}", str(path))
    if not real.is_file() or real.stat().st_size > 2**31:
        raise OSError(errno.EINVAL, "is no regular file of at most 2 GiB", str(path))
    with real.open("rb") as file:
        return file.read(most)


def write_atomically(path: Path, text: str) -> Path:
    """Writes text (UTF-8, as it is) to a new file beside `path`, then renames it; an old file is replaced.

    Raises:
        OSError: If it cannot be written. An old file is then as it was, and the new one is removed.
    """
    new = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        new.unlink(missing_ok=True)  # and "x", so that no link that lies there is followed
        with new.open("x", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)
    return path
