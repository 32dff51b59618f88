"""Draws the pictures of a run, and writes them into its folder. What is drawn, and how: `archzoo.pictures`.

A picture is a nicety: no failure to draw one may cost the run, nor may drawing change a number of it, or of the runs
behind it in the same process.
"""

import contextlib
import functools
import io
import logging
import random
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from archzoo.pictures import Picture
from archzoo.report.pictures import FOLDER, LARGEST, MOST, NAME
from archzoo.tasks.task import Task
from archzoo.training.checkpoint import get_random_state, replace_file, set_random_state

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger("archzoo")
MAGENTA = (255, 0, 255)
DPI = 144
LONGEST_CAPTION = 600
MISSING = "matplotlib is not installed; `pip install 'archzoo[train]'` installs it"


@dataclass(frozen=True, slots=True)
class Drawn:
    """A picture that was written."""

    name: str
    caption: str
    path: Path


def draw_pictures(folder: Path, task: Task, model: nn.Module) -> tuple[list[Drawn], list[str]]:
    """Writes the pictures of a task and of a model to `folder/pictures`, and nothing where there are none.

    Args:
        folder: The run's. Pictures that are there from before are removed.
        task: Is asked first.
        model: That is scored. It is put into evaluation mode.

    Returns:
        What was written, in the order drawn, and what was not and why, which is also logged.
    """
    shutil.rmtree(folder / FOLDER, ignore_errors=True)
    drawn: dict[str, Drawn] = {}
    failed: list[str] = []
    hooks: list[tuple[str, Callable[[], Mapping[str, Picture]]]]
    hooks = [(f"task {type(task).__name__}", lambda: task.pictures(model))]
    if callable(of_model := getattr(model, "pictures", None)):
        hooks.append((f"model {type(model).__name__}", lambda: of_model(task)))
    model.eval()
    with _undisturbed(), _settings():
        for who, hook in hooks:
            try:
                pictures = list(hook().items())
            except Exception as error:  # whatever it is, the run is done, and its numbers are what counts
                failed.append(f"{who}: {_reason(error)}")
                continue
            for name, picture in pictures:
                try:
                    _check(name, picture, drawn)
                    path = folder / FOLDER / f"{name}.png"
                    _write(path, encode(picture.image))
                except Exception as error:  # the same
                    failed.append(f"{who}, picture {name!r}: {_reason(error)}")
                else:
                    drawn[name] = Drawn(name, picture.caption, path)
    for line in failed:
        if MISSING in line:
            _say_once(f"pictures are left out: {MISSING}")
        else:
            log.warning("not drawn: %s", line)
    return list(drawn.values()), failed


def _reason(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == "matplotlib":
        return MISSING
    return f"{type(error).__name__}: {error}"


@functools.cache
def _say_once(text: str) -> None:
    """Logs a warning, once a process: the runs of a sweep all lack the same package."""
    log.warning(text)


def _check(name: str, picture: Picture, drawn: Mapping[str, Drawn]) -> None:
    if not isinstance(name, str) or not re.fullmatch(NAME, name):
        raise ValueError(f"name={name!r}: must be of small letters, digits, _ and -, 64 at most, as 'reconstructions'")
    if name in drawn:
        raise ValueError(f"name={name!r}: the task has a picture of this name; take another one")
    if len(drawn) == MOST:
        raise ValueError(f"a run has {MOST} pictures at most")
    if not isinstance(picture, Picture):
        raise TypeError(f"{picture!r}: must be an archzoo.pictures.Picture, an image and its caption")
    if not isinstance(picture.caption, str) or len(picture.caption) > LONGEST_CAPTION:
        raise ValueError(f"caption={picture.caption!r}: must be a text of {LONGEST_CAPTION} characters at most")


def _write(path: Path, data: bytes) -> None:
    if len(data) > LARGEST:
        raise ValueError(f"its file would have {len(data):,} bytes: {LARGEST:,} at most; draw fewer pixels")
    path.parent.mkdir(exist_ok=True)
    replace_file(path, data)


# ---- a PNG file


def encode(image: "Tensor | Figure") -> bytes:
    """The PNG file of a `Picture`'s image; the same bytes for the same image.

    Raises:
        TypeError: If it is neither a tensor of numbers nor a figure.
        ValueError: If a tensor has not the shape of an image.
    """
    if not isinstance(image, Tensor):
        return _encode_figure(image)
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(_pixels(image)).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _pixels(image: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """(H, W) or (H, W, 3), uint8."""
    values = image.detach().cpu().double()
    values = values.unsqueeze(0) if values.ndim == 2 else values
    if values.ndim != 3 or values.shape[0] not in (1, 3) or 0 in values.shape:
        raise ValueError(f"an image of shape {tuple(image.shape)}: must be (height, width), (1, …) or (3, …)")
    known = values.isfinite()
    levels = (values.nan_to_num(0.0, 1.0, 0.0).clamp(0, 1) * 255).round().to(torch.uint8)
    if not known.all():
        levels = torch.where(known.all(0), levels, torch.tensor(MAGENTA, dtype=torch.uint8)[:, None, None])
    return (levels[0] if len(levels) == 1 else levels.permute(1, 2, 0)).contiguous().numpy()


def _encode_figure(figure: Any) -> bytes:
    from matplotlib.figure import Figure

    if not isinstance(figure, Figure):
        raise TypeError(f"image={figure!r}: must be a tensor, or a Figure of matplotlib")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    if (pyplot := sys.modules.get("matplotlib.pyplot")) is not None:
        pyplot.close(figure)  # those of pyplot would stay in memory
    return buffer.getvalue()


# ---- around the drawing


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """The same random numbers whenever a picture is drawn, and behind it those that came before; no gradients."""
    before = get_random_state()
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    try:
        with torch.no_grad():
            yield
    finally:
        set_random_state(before)


@contextlib.contextmanager
def _settings() -> Iterator[None]:
    """matplotlib, where there is one, with the report's settings whatever the user's are, and mathematics in texts."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        yield
        return
    from archzoo.report.canvas import plain_matplotlib

    with plain_matplotlib():
        matplotlib.rcParams.update({"text.parse_math": True, "font.size": 10, "figure.facecolor": "white"})
        yield
