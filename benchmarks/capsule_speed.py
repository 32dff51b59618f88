"""Time and memory of dynamic routing and of CapsNet beside the textbook form, on one CPU thread.

The textbook form is that of the port most used, XifengGuo's CapsNet-Pytorch, written out plainly: all votes as one
tensor by a broadcast matrix product, and the couplings by autograd. Like most ports it differentiates the last round
only; `textbook_full` is the same without that, as the paper's authors have it. Our layer is compared with the former in
both of its modes. Sizes are those of the paper's network for MNIST: 1152 capsules of 8 to 10 of 16, three rounds.

Contestants take turns in one process, and ratios are of their least CPU times. `layer`: forward and backward of the
routing alone; `step`: forward, margin loss and backward of the whole network, without decoder. Kept: what autograd
holds for the backward pass of the layer, besides its input and its parameters.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from archzoo.layers.capsules import DynamicRouting, margin_loss
from archzoo.models.capsnet import CapsNet
from benchmarks._record import environment
from benchmarks.kan_speed import kept
from benchmarks.neuron_speed import peak, race, step

RESULTS = Path(__file__).parent / "results" / "capsule_speed.json"
SIZES = (1152, 10, 8, 16)


class TextbookRouting(nn.Module):
    """Routing with all votes held, (batch, out_capsules, in_capsules, out_dim)."""

    def __init__(self, in_capsules: int, out_capsules: int, in_dim: int, out_dim: int, rounds: int, detach: bool):
        super().__init__()
        self.rounds, self.detach = rounds, detach
        self.weight = nn.Parameter(0.1 * torch.randn(out_capsules, in_capsules, out_dim, in_dim).clamp(-2, 2))

    def forward(self, u: Tensor) -> Tensor:
        votes = torch.squeeze(torch.matmul(self.weight, u[:, None, :, :, None]), dim=-1)
        early = votes.detach() if self.detach else votes
        logits = torch.zeros(votes.shape[:3])
        for _ in range(self.rounds - 1):
            v = self.squash((logits.softmax(1)[..., None] * early).sum(-2, keepdim=True))
            logits = logits + (v * early).sum(-1)
        return self.squash((logits.softmax(1)[..., None] * votes).sum(-2, keepdim=True)).squeeze(-2)

    @staticmethod
    def squash(s: Tensor) -> Tensor:
        n = torch.norm(s, p=2, dim=-1, keepdim=True)
        return n**2 / (1 + n**2) / (n + 1e-8) * s


def goal(value: float, sign: str, limit: float) -> dict[str, Any]:
    met = value >= limit if sign == ">=" else value <= limit
    return {"value": round(value, 3), "goal": f"{sign} {limit:g}", "met": met}


def measure_layers(batch: int, rounds: int, seconds: float) -> dict[str, Any]:
    torch.manual_seed(0)
    layers: dict[str, nn.Module] = {
        "detached": DynamicRouting(*SIZES, iterations=rounds, detach=True),
        "full": DynamicRouting(*SIZES, iterations=rounds),
        "textbook": TextbookRouting(*SIZES, rounds, detach=True),
        "textbook_full": TextbookRouting(*SIZES, rounds, detach=False),
    }
    u = (0.3 * torch.rand(batch, SIZES[0], SIZES[2])).requires_grad_()
    dy = torch.randn(batch, SIZES[1], SIZES[3])
    times = race({name: lambda layer=layer: step(layer, u, dy) for name, layer in layers.items()}, seconds)
    with torch.no_grad():
        forward = race({name: lambda layer=layer: layer(u) for name, layer in layers.items()}, seconds / 3)
    held = {name: kept(layer, u) for name, layer in layers.items()}
    most = {name: peak(layer, u, dy) for name, layer in layers.items()}
    goals = {}
    if (batch, rounds) == (32, 3):
        goals = {
            "textbook/detached": goal(times["textbook"] / times["detached"], ">=", 4),
            "textbook/full": goal(times["textbook"] / times["full"], ">=", 2.5),
            "kept by full, MB": goal(held["full"] / 1e6, "<=", 1),
        }
    return {
        "what": "layer",
        "batch": batch,
        "rounds": rounds,
        "ms": {name: round(value, 3) for name, value in times.items()},
        "forward_ms": {name: round(value, 3) for name, value in forward.items()},
        "kept_MB": {name: round(value / 1e6, 3) for name, value in held.items()},
        "peak_MB": {name: round(value / 1e6, 3) for name, value in most.items()},
        "goals": goals,
    }


def measure_networks(batch: int, seconds: float) -> dict[str, Any]:
    torch.manual_seed(0)
    networks = {
        "detached": CapsNet(decoder=None, detach=True),
        "full": CapsNet(decoder=None),
        "textbook": CapsNet(decoder=None, routing=lambda *sizes: TextbookRouting(*sizes, 3, detach=True)),
        "convolutions": CapsNet(decoder=None, routing=lambda *sizes: _Few()),
    }
    x, target = torch.rand(batch, 1, 28, 28), torch.randint(10, (batch,))

    def train(network: nn.Module) -> None:
        loss = margin_loss(network(x), target)
        torch.autograd.grad(loss, list(network.parameters()))

    times = race({name: lambda network=network: train(network) for name, network in networks.items()}, seconds)
    goals = {}
    if batch == 32:
        goals = {f"textbook/{name}": goal(times["textbook"] / times[name], ">=", 1.4) for name in ("detached", "full")}
    return {
        "what": "step",
        "batch": batch,
        "rounds": 3,
        "ms": {name: round(value, 2) for name, value in times.items()},
        "goals": goals,
    }


class _Few(nn.Module):
    """No routing: the first ten capsules stand for the classes. What remains is the convolutions' time."""

    def forward(self, u: Tensor) -> Tensor:
        return u[:, :10]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks capsule_speed", description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0, help="for each row")
    parser.add_argument("--record", action="store_true", help=f"write results/{RESULTS.name}")
    args = parser.parse_args(argv)
    if not 0 < args.seconds < math.inf:
        parser.error(f"argument --seconds: {args.seconds}: must be above 0")
    torch.set_num_threads(1)
    rows = []
    for batch, rounds in ((32, 3), (32, 1), (1, 3)):
        rows.append(measure_layers(batch, rounds, args.seconds))
        print(json.dumps(rows[-1]), flush=True)
    rows.append(measure_networks(32, args.seconds))
    print(json.dumps(rows[-1]), flush=True)
    if args.record:
        command = f"python -m benchmarks capsule_speed --seconds {args.seconds:g}"
        record = {"benchmark": "capsule_speed", "command": command, "rows": rows, **environment()}
        RESULTS.write_text(json.dumps(record, indent=1) + "\n")
        print(f"wrote {RESULTS}")
