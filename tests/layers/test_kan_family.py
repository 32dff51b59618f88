"""What the spec asks of every linear KAN layer alike: it learns to read digits."""

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import archzoo

FAMILY = ("kan", "fast_kan", "chebyshev_kan", "fourier_kan", "sine_kan", "wavelet_kan", "rational_kan")


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    """The 1797 images of the UCI test set, (1797, 64) from -1 to 1, in a fixed random order; and their classes."""
    images, classes = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return torch.tensor(images, dtype=torch.float32)[order] / 8 - 1, torch.tensor(classes)[order]


def accuracy_on_digits(name: str, digits: tuple[Tensor, Tensor], seed: int) -> float:
    """[64, 32, LayerNorm, 10] after 15 epochs over 1400 images, on the other 397."""
    torch.manual_seed(seed)
    model = nn.Sequential(archzoo.create_layer(name, 64, 32), nn.LayerNorm(32), archzoo.create_layer(name, 32, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    images, classes = digits
    for _ in range(15):
        for batch in torch.randperm(1400).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), classes[batch]).backward()
            optimizer.step()
    with torch.no_grad():
        return (model(images[1400:]).argmax(1) == classes[1400:]).double().mean().item()


@pytest.mark.parametrize("name", [FAMILY[0], *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILY[1:])])
def test_reads_digits(name, digits):
    assert name in archzoo.list_layers(kind="linear")
    assert accuracy_on_digits(name, digits, seed=0) >= 0.92
