"""The usual convolution, the baseline that every contestant of its kind is compared with."""

from torch import nn

from archzoo.registry import Card, register_layer

Conv2d = register_layer(
    "conv2d",
    kind="conv2d",
    card=Card(
        title="The convolution of the convolutional neural network",
        authors="Fukushima; LeCun, Boser, Denker, Henderson, Howard, Hubbard, Jackel",
        year=1989,
        arxiv="",
        equation=r"y_o = b_o + \sum_{c} W_{oc} * x_c",
        headline="the baseline of every comparison of convolutions",
        reproduced="nothing to reproduce: it is torch.nn.Conv2d",
    ),
)(nn.Conv2d)
"""`torch.nn.Conv2d` itself, under the name `conv2d`. Models put their activation behind it."""
