"""Time of the trainer over a bare torch loop that does the same steps (digits, MLP, one CPU thread).

The bare loop is what a person would write to be fast: batches by one indexing of a tensor, torch's own AdamW and cosine
schedule, a look at the loss and a line of a log every 20 steps, the same evaluations, nothing else. Both train the same
model on the same batches, alternately, in one process; the ratio of the minima is printed. Goal: at most 1.05.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from archzoo.training.build import build_model, build_task
from archzoo.training.config import OptimizerConfig, SchedulerConfig, TrainConfig, TrainerConfig
from archzoo.training.data import BatchOrder
from archzoo.training.loop import Trainer
from benchmarks._record import environment


def config(steps: int) -> TrainConfig:
    return TrainConfig(
        task={"name": "digits"},
        model={"name": "mlp", "width": 64, "depth": 2},
        layer={"name": "linear"},
        optimizer=OptimizerConfig(weight_decay=0.01),
        scheduler=SchedulerConfig(),
        trainer=TrainerConfig(steps=steps, log_every=20, eval_every=200),
    )


def ours(steps: int, folder: Path) -> float:
    cfg = config(steps)
    task = build_task(cfg)
    torch.manual_seed(0)
    model, _ = build_model(cfg, task)
    with (folder / "ours.jsonl").open("w") as file:

        def write(line: dict[str, float]) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()

        trainer = Trainer(cfg, task, model, record=write)
        began = time.perf_counter()
        trainer.fit()
        return time.perf_counter() - began


def bare(steps: int, folder: Path) -> float:
    cfg = config(steps)
    task = build_task(cfg)
    torch.manual_seed(0)
    model, _ = build_model(cfg, task)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}], lr=1e-3
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    inputs, targets = task.train.inputs, task.train.targets
    batches = BatchOrder(len(inputs), 64, seed=0).tensors()
    model.train()
    with (folder / "bare.jsonl").open("w") as file:
        began = time.perf_counter()
        for step in range(1, steps + 1):
            chosen = next(batches)
            loss = nn.functional.cross_entropy(model(inputs[chosen]), targets[chosen])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if step % 20 == 0:
                line = {"step": step, "train/loss": loss.item(), "lr": schedule.get_last_lr()[0]}
                file.write(json.dumps(line) + "\n")
                file.flush()
            if step % 200 == 0:
                model.eval()
                with torch.no_grad():
                    output = model(task.val.inputs)
                    accuracy = (output.argmax(1) == task.val.targets).float().mean().item()
                    loss = nn.functional.cross_entropy(output, task.val.targets)
                file.write(json.dumps({"step": step, "val/accuracy": accuracy, "val/loss": loss.item()}) + "\n")
                model.train()
        return time.perf_counter() - began


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks trainer_overhead", description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ours(200, folder), bare(200, folder)  # warm both up
        times = [(ours(args.steps, folder), bare(args.steps, folder)) for _ in range(args.repeats)]
    best = [min(column) for column in zip(*times, strict=True)]
    print(
        json.dumps(
            {
                "benchmark": "trainer_overhead",
                "command": f"python -m benchmarks trainer_overhead --steps {args.steps} --repeats {args.repeats}",
                "ratio": round(best[0] / best[1], 4),
                "ratio_of_each_pair": [round(a / b, 4) for a, b in times],
                "step_us_bare": round(best[1] / args.steps * 1e6, 1),
                "steps": args.steps,
                **environment(),
            }
        )
    )
