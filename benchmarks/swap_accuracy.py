"""What a swap into a trained vision transformer does to its accuracy, before and after an epoch of further training.

A small vision transformer of timm learns MNIST. Its perceptrons are then swapped for those of other layers, which start
from the trained weights (`archzoo.swap(model, {"blocks.*.mlp": layer}, init="from_original")`), and the test images are
classified again. Where the start is not exact, as of PHM, whose matrices have fewer numbers, one epoch of training
follows; beside it stand the same from a fresh start, and the original trained for as long.

    python -m benchmarks swap_accuracy [--record]

About three minutes on one core, with the files of MNIST in the folder ARCHZOO_DATA; --record puts it into
`benchmarks/results/swap_accuracy.json`.
"""

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import archzoo
from archzoo.tasks.mnist import MNIST
from benchmarks._record import environment

RESULTS = Path(__file__).parent / "results" / "swap_accuracy.json"
SHAPE = {"img_size": 28, "patch_size": 7, "in_chans": 1, "num_classes": 10, "embed_dim": 32, "depth": 2, "num_heads": 2}
STARTS = {"class_token": False, "global_pool": "avg", "weight_init": "jax"}  # learns sooner
MODEL: dict[str, Any] = SHAPE | STARTS
SETTING: dict[str, Any] = {"train_size": 10_000, "epochs": 5, "batch": 32, "lr": 4e-3, "seeds": 3}
EXACT = ("kan", "aptx", "paon")


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, lr: float) -> None:
    """Adam with a rate that falls to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    batches = len(images) // SETTING["batch"]
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
    model.train()
    for _ in range(epochs):
        for index in torch.randperm(len(images)).split(SETTING["batch"])[:batches]:
            optimizer.zero_grad()
            F.cross_entropy(model(images[index]), labels[index]).backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Percent of images that are classified rightly."""
    model.eval()
    right = sum(
        int((model(x).argmax(-1) == y).sum()) for x, y in zip(images.split(1000), labels.split(1000), strict=True)
    )
    return 100 * right / len(images)


def row(seed: int, data: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """One trained model, and all swaps into it."""
    torch.manual_seed(seed)
    model = timm.create_model("vit_tiny_patch16_224", **MODEL)
    train(model, *data["train"], SETTING["epochs"], SETTING["lr"])
    calibration = data["train"][0][:256]
    found: dict[str, Any] = {"seed": seed, "original": accuracy(model, *data["test"]), "exact": {}}
    for layer in EXACT:
        report = archzoo.swap(model, {"blocks.*.mlp": layer}, init="from_original", calibration=calibration)
        error = max(swapped.error for swapped in report.swaps)
        found["exact"][layer] = {
            "start": report.swaps[0].start,
            "error": float(f"{error:.2g}"),
            "accuracy": accuracy(model, *data["test"]),
            "parameters": report.parameters,
        }
        archzoo.unswap(report)
    contestants = {"original": None, "phm": "from_original", "phm, fresh": "fresh"}
    found["one_epoch"] = {}
    for name, init in contestants.items():
        student = copy.deepcopy(model)
        if init is not None:
            archzoo.swap(student, {"blocks.*.mlp": "phm"}, init=init, phm={"n": 2})
        before = accuracy(student, *data["test"])
        torch.manual_seed(seed)
        train(student, *data["train"], 1, SETTING["lr"] / 4)
        found["one_epoch"][name] = {"before": before, "after": accuracy(student, *data["test"])}
    return found


def measure() -> dict[str, Any]:
    """All of it, printed as it comes."""
    began = time.perf_counter()
    task = MNIST(train_size=SETTING["train_size"])
    data = {name: (part.inputs, part.targets) for name, part in (("train", task.train), ("test", task.test))}
    rows = []
    for seed in range(SETTING["seeds"]):
        rows.append(row(seed, data))
        print(json.dumps(rows[-1]), flush=True)
    return {
        "command": "python -m benchmarks swap_accuracy --record",
        "environment": environment(),
        "wall_s": round(time.perf_counter() - began, 1),
        "model": {"timm": "vit_tiny_patch16_224", **MODEL},
        **SETTING,
        "rows": rows,
    }


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks swap_accuracy", description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help=f"write {RESULTS.name}")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    record = measure()
    print(f"{record['wall_s']} s")
    if args.record:
        RESULTS.write_text(json.dumps(record, indent=1) + "\n")
        print(f"wrote {RESULTS}")
