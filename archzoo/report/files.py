"""Files that are there whole or not at all."""

import os
from pathlib import Path


def write_atomically(path: Path, text: str) -> Path:
    """Writes text (UTF-8, as it is) to a new file beside `path`, then renames it; an old file is replaced.

    Raises:
        OSError: If it cannot be written. An old file is then as it was, and the new one is removed.
    """
    new = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with new.open("w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)
    return path
