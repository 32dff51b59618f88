"""Draws the README's picture of super-resolution from finished runs: bicubic, ReLU, PAON and the truth.

Of each layer it takes the run with the best PSNR in validation among those of one depth, and of the test split the
first images, so that nobody chose them by their look. Writes docs/super_resolution.png.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from archzoo.tasks.super_resolution import SuperResolution, psnr
from archzoo.training.build import build_task
from archzoo.training.config import from_plain
from archzoo.training.run import load_model

DOCS = Path(__file__).parents[1] / "docs"
SHOWN = 96  # pixels of a larger image that are shown, around its centre


def best_run(folder: Path, layer: str, depth: int) -> tuple[Path, dict[str, Any]]:
    """The run of a layer at a depth of the model with the best PSNR in validation, and its record."""
    records = [(path.parent, json.loads(path.read_text())) for path in sorted(folder.glob("*/run.json"))]
    runs = [
        (path, record)
        for path, record in records
        if record["status"] == "done"
        and record["config"]["layer"]["name"] == layer
        and record["config"]["model"].get("depth") == depth
    ]
    if not runs:
        raise ValueError(f"folder={str(folder)!r}: holds no run of layer {layer} at depth {depth} that is done")
    return max(runs, key=lambda run: run[1]["summary"]["best"]["val/psnr"])


def described(record: dict[str, Any]) -> str:
    layer = record["config"]["layer"]
    if layer["name"] == "paon_conv2d":
        name = "PAON {} [{}/{}]".format(layer["variant"], *layer["degrees"])
    else:
        name = "ReLU" if layer["name"] == "conv2d" else layer["name"]
    return f"{name}\n{record['parameters']:,} parameters"


def centre(image: Tensor) -> Tensor:
    """(height, width, channels) of the middle of an image (channels, height, width), in [0, 1]."""
    top, left = (max(0, side - SHOWN) // 2 for side in image.shape[-2:])
    return image[:, top : top + SHOWN, left : left + SHOWN].clamp(0, 1).permute(1, 2, 0)


@torch.no_grad()
def draw(folder: Path, path: Path, layers: list[str], depth: int, images: int) -> None:
    from matplotlib import pyplot

    runs = [best_run(folder, layer, depth) for layer in layers]
    task = build_task(from_plain(runs[0][1]["config"]))
    if not isinstance(task, SuperResolution):
        raise ValueError(f"folder={str(folder)!r}: its runs are of task {runs[0][1]['config']['task']['name']}")
    models = [load_model(run) for run, _ in runs]
    columns = ["low resolution", "bicubic", *(described(record) for _, record in runs), "truth"]
    size = 1.55
    figure, axes = pyplot.subplots(
        images, len(columns), figsize=(size * len(columns), (size + 0.2) * images + 0.35), squeeze=False
    )
    for number, row in enumerate(axes):
        low, high = (part[None] for part in task.test[number])
        outputs = [task.bicubic(low), *(model(low) for model in models)]
        for ax, image in zip(row, [low, *outputs, high], strict=True):
            ax.imshow(centre(image[0]).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            ax.set(xticks=[], yticks=[])
        for ax, output in zip(row[1:], outputs, strict=False):
            ax.set_xlabel(f"{psnr(*task.comparable(output, high)).item():.2f} dB", fontsize=8, labelpad=2)
    for ax, name in zip(axes[0], columns, strict=True):
        ax.set_title(name, fontsize=8, pad=4)
    figure.tight_layout(pad=0.4, h_pad=0.3, w_pad=0.3)
    figure.savefig(path, dpi=160)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks super_resolution_picture", description=__doc__)
    parser.add_argument("folder", type=Path, help="as outputs/super_resolution")
    parser.add_argument("--out", type=Path, default=DOCS / "super_resolution.png")
    parser.add_argument("--layers", nargs="+", default=["conv2d", "paon_conv2d"])
    parser.add_argument("--depth", type=int, default=2, help="model.depth of the runs")
    parser.add_argument("--images", type=int, default=3, help="how many of the test images: the first ones")
    args = parser.parse_args(argv)
    import matplotlib

    matplotlib.use("Agg")
    torch.set_num_threads(1)
    draw(args.folder, args.out, args.layers, args.depth, args.images)
    print(f"wrote {args.out}")
