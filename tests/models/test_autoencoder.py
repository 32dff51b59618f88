import re

import pytest
import torch
from torch import nn

from archzoo.models.autoencoder import Autoencoder
from archzoo.models.model import LayerFactory


def build(layer="kan", input_shape=(1, 4, 4), output_size=16, **options):
    return Autoencoder(LayerFactory(layer), input_shape, output_size, **options)


def kinds(side):
    return [type(module).__name__ for module in side]


def sizes(side):
    return [(m.in_features, m.out_features) for m in side if hasattr(m, "in_features")]


def test_it_is_registered():
    from archzoo.models.model import models

    assert models.get("autoencoder") is Autoencoder


def test_encoder_is_layer_relu_linear_and_decoder_its_mirror_image():
    model = build(width=8, latent=3)
    assert kinds(model.encoder) == ["KANLinear", "ReLU", "Linear"]
    assert kinds(model.decoder) == ["Linear", "ReLU", "KANLinear"]
    assert sizes(model.encoder) == [(16, 8), (8, 3)]
    assert sizes(model.decoder) == [(3, 8), (8, 16)]
    deep = build(widths=(9, 7, 5), latent=3)
    assert sizes(deep.encoder) == [(16, 9), (9, 7), (7, 5), (5, 3)]
    assert sizes(deep.decoder) == [(b, a) for a, b in reversed(sizes(deep.encoder))]
    assert kinds(deep.decoder) == kinds(deep.encoder)[::-1]
    assert sizes(build(width=6, depth=2).encoder) == [(16, 6), (6, 6), (6, 16)]


def test_forward_decodes_what_encode_gives():
    model = build(width=8, latent=3)
    x = torch.randn(5, 1, 4, 4)
    assert model.encode(x).shape == (5, 3)
    assert model(x).shape == (5, 16)
    assert torch.equal(model(x), model.decode(model.encode(x)))
    assert model(x[:0]).shape == (0, 16)


def test_activation_is_the_same_for_all_unless_it_is_auto():
    assert kinds(build("linear").encoder) == ["Linear", "ReLU", "Linear"]
    assert kinds(build("linear", activation="auto").encoder) == ["Linear", "ReLU", "Linear"]
    assert kinds(build(activation="auto").encoder) == ["KANLinear", "Linear"]
    assert kinds(build(activation="none").decoder) == ["Linear", "KANLinear"]
    assert kinds(build(activation="silu").decoder) == ["Linear", "SiLU", "KANLinear"]


def test_it_learns_to_draw_points_of_a_plane():
    """Two numbers suffice for 16 that are a linear function of two."""
    x = (torch.randn(256, 2) @ torch.randn(2, 16)).view(256, 1, 4, 4) / 4
    model = build("linear", width=16, latent=2, activation="none")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(300):
        loss = nn.functional.mse_loss(model(x), x.flatten(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 1e-3 * x.square().mean().item()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_size": 10}, "16 numbers again, and the task wants 10; choose task=autoencoding"),
        ({"width": 0}, "width=0, depth=1: both must be 1 or more"),
        ({"depth": 0}, "depth=0"),
        ({"widths": (3, 0)}, "must be 1 or more"),
        ({"latent": 0}, "latent=0"),
        ({"activation": "rleu"}, "activation='rleu': did you mean 'relu'"),
        (
            {"layer": "conv2d"},
            "'conv2d' is of kind 'conv2d', and model 'autoencoder' is made of layers of kind 'linear'",
        ),
    ],
)
def test_a_wrong_option_is_named(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build(**options)
