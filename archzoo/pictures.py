"""Pictures that a run draws for people to look at, and what helps to draw them.

At the end of a run the trainer asks its task and its model for pictures of the model that is scored, writes them to
`pictures/NAME.png` of the run's folder, and gives them to the trackers; the report shows those of the best run of each
contestant. Whoever has something to show defines one of two methods:

    class MyTask(Task):
        def pictures(self, model: nn.Module) -> Mapping[str, Picture]: ...

    class MyModel(nn.Module):
        def pictures(self, task: Task) -> Mapping[str, Picture]: ...

A name is of small letters, digits, `_` and `-`, as `reconstructions`; several pictures may be returned, or none. Both
methods are called once, with the best weights, in evaluation mode, without gradients (`torch.enable_grad()` brings them
back), on the device of the run, and with random states as after seeding with 0, which are put back behind it: the same
model draws the same bytes. What fails is named in `log.txt` and in the run's record, and the run is none the worse.
`archzoo.training.pictures` is the code that does all that; `tracker.pictures=false` leaves it out.

An image needs no more than torch. A figure needs matplotlib, which is imported inside the method: where it is not
installed, the pictures of that method are left out, and the run says so.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture, and what to say below it.

    Args:
        image: An image with values from 0 (black) to 1, beyond which they are cut off: (H, W) or (1, H, W) grey,
            (3, H, W) in colour, of any float or integer type and on any device; what is not a number is magenta. Or a
            figure, `matplotlib.figure.Figure(figsize=…)`, not one of pyplot; it is drawn with 144 pixels an inch.
        caption: What is to be seen, in a plain sentence or two.
    """

    image: "Tensor | Figure"
    caption: str


@torch.no_grad()
def outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    """What a model makes of inputs, float64 on the CPU.

    Args:
        model: In evaluation mode.
        inputs: A batch, on any device; it goes to the model's, and to the dtype of its parameters where it is floating.
    """
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    if parameter is not None:
        inputs = inputs.to(parameter if inputs.is_floating_point() else parameter.device)
    return model(inputs).double().cpu()


def tiles(rows: Sequence[Tensor], zoom: int = 1, gap: int = 2) -> Tensor:
    """Images in rows and columns, as one image.

    Args:
        rows: From top to bottom, each (columns, channels, H, W); all of one shape.
        zoom: Side of the square that stands for a pixel.
        gap: White pixels between two images.

    Returns:
        (channels, rows · (zoom · H + gap) - gap, columns · (zoom · W + gap) - gap), of the rows' dtype, on the CPU.
    """
    if len({tuple(row.shape) for row in rows}) != 1 or rows[0].ndim != 4:
        shapes = ", ".join(str(tuple(row.shape)) for row in rows)
        raise ValueError(f"rows of shapes {shapes or '()'}: must be of one shape, (columns, channels, height, width)")
    images = torch.stack([row.detach().cpu() for row in rows])
    images = images.repeat_interleave(zoom, -1).repeat_interleave(zoom, -2)
    images = nn.functional.pad(images, (0, gap, 0, gap), value=1.0)
    sheet = images.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
    return sheet[:, : sheet.shape[1] - gap, : sheet.shape[2] - gap]


def compared(target: Tensor, output: Tensor, extent: tuple[float, float, float, float]) -> "Figure":
    """A function of the plane, what a model makes of it, and the difference, as maps of colours side by side.

    Args:
        target: Values (ny, nx) at the midpoints of equal cells of a rectangle, the first row at the lowest y.
        output: The same of the model; it is shown in the colours of the target's scale.
        extent: Ends of the rectangle: x from, x to, y from, y to.
    """
    from matplotlib.figure import Figure

    target, error = target.double().cpu(), (output - target).double().cpu()
    low, high = float(target.min()), float(target.max())
    most = float(error.nan_to_num(0.0, 0.0, 0.0).abs().max()) or 1.0
    panels = (
        ("target", target, "viridis", low, high),
        ("output", target + error, "viridis", low, high),
        ("output − target", error, "RdBu_r", -most, most),
    )
    figure = Figure(figsize=(9.6, 2.7))
    figure.subplots_adjust(left=0.05, right=0.95, bottom=0.1, top=0.9, wspace=0.12)
    grid = figure.subplots(1, 3, sharey=True)
    for axes, (title, values, colours, least, largest) in zip(grid, panels, strict=True):
        image = axes.imshow(
            values.numpy(), cmap=colours, vmin=least, vmax=largest, extent=extent, origin="lower", aspect="auto"
        )
        axes.set_title(title)
        figure.colorbar(image, ax=axes)
    return figure
