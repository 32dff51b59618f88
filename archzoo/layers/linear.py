"""The usual linear layer, the baseline that every contestant is compared with."""

from torch import nn

from archzoo.registry import Card, register_layer

Linear = register_layer(
    "linear",
    kind="linear",
    card=Card(
        title="The affine layer of the multilayer perceptron",
        authors="Rosenblatt; Rumelhart, Hinton, Williams",
        year=1986,
        arxiv="",
        equation=r"y = W x + b",
        headline="the baseline of every comparison",
        reproduced="nothing to reproduce: it is torch.nn.Linear",
    ),
)(nn.Linear)
"""`torch.nn.Linear` itself, under the name `linear`. Models put their activation behind it."""
