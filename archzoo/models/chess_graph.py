"""The chess board as a graph of 65 nodes, and a graph network on it (arXiv 2507.10951, 1905.12265)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archzoo.models.chess_planes import POSITION, expand_planes

NODES, HUB = 65, 64
"""The squares, 8 rank + file, and the global node behind them."""
_DIRECTIONS = ("forward", "back", "sideways", "diagonally forward", "diagonally back")
KINDS = (*(f"step {way}" for way in _DIRECTIONS), *(f"farther {way}" for way in _DIRECTIONS), "knight", "global")
"""Of edges, by the way from the sender to the receiver, as the mover sees the board."""


def edge_kind(sender: int, receiver: int) -> int | None:
    """Which of `KINDS` the edge between two nodes is, None if there is no edge.

    Squares are joined as a queen or a knight moves on an empty board, and every square with the global node, both ways.
    """
    if sender == receiver:
        return None
    if HUB in (sender, receiver):
        return KINDS.index("global")
    up, aside = receiver // 8 - sender // 8, abs(receiver % 8 - sender % 8)
    if {abs(up), aside} == {1, 2}:
        return KINDS.index("knight")
    if up and aside and abs(up) != aside:
        return None
    direction = 2 if not up else (0 if up > 0 else 1) + (3 if aside else 0)
    return direction + (0 if max(abs(up), aside) == 1 else len(_DIRECTIONS))


def board_adjacency() -> Tensor:
    """The 1,920 edges as a matrix of 0 and 1 for each kind, [kind, receiver, sender], (12, 65, 65) float32."""
    edges = [[[edge_kind(sender, receiver) == kind for sender in range(NODES)] for receiver in range(NODES)]
             for kind in range(len(KINDS))]  # fmt: skip
    return torch.tensor(edges, dtype=torch.float32, device="cpu")


def _perceptron(features: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(features, width), nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, width))


class BoardGINE(nn.Module):
    r"""Graph isomorphism layer with edge features, on the board.

    $h_i' = f(h_i + \sum_j \mathrm{ReLU}(h_j + L e_{ij}))$, the sum over the nodes j that send to node i. f is a
    perceptron of two layers, L a linear one, and e depends on an edge's kind alone. Hence a node sends the same to all
    neighbours of a kind, and the sum over these is one matrix product: 780 messages are made instead of 1,920, and
    there are no atomics, so that two runs agree bit for bit.

    Args:
        width: Size D of a node's and of an edge's features.

    Attributes:
        message: L.
        update: f.

    Shape: (65, batch, D), adjacency (kinds, 65, 65) and features of each kind of edge (kinds, D) -> (65, batch, D).
    """

    def __init__(self, width: int):
        super().__init__()
        self.message, self.update = nn.Linear(width, width), _perceptron(width, width)

    def forward(self, h: Tensor, adjacency: Tensor, edges: Tensor) -> Tensor:
        """Maps the nodes' features (65, batch, D) to new ones."""
        total = h
        for neighbours, edge in zip(adjacency, self.message(edges), strict=True):
            total = total + (neighbours @ F.relu(h + edge).flatten(1)).view_as(h)
        new: Tensor = self.update(total)
        return new


class GraphEncoder(nn.Module):
    """The paper's graph network: 2 GINE layers on 65 nodes, 128 wide, mean and maximum over the nodes.

    A square's features are its values in the 24 planes of `expand_planes`; the global node's are 0. They pass a
    perceptron, and each layer is followed by a LayerNorm and a ReLU. All that is unpublished: features, kinds of edges,
    norms. It is chosen so that a GNN-BPU (256 to 430, output pool of 400, 2 logits, biases) has the 232,912 learned
    parameters that the paper names, exactly: 121,600 = 950 x 128 of them are here.

    Args:
        width: Size D of a node's features.
        depth: Number of GINE layers.

    Attributes:
        out_features: 2 D.

    Shape: (batch, 8, 8, 8) -> (batch, 2 D).
    """

    adjacency: Tensor

    def __init__(self, width: int = 128, depth: int = 2):
        super().__init__()
        self.out_features = 2 * width
        self.register_buffer("adjacency", board_adjacency(), persistent=False)
        self.nodes = _perceptron(POSITION, width)
        self.edges = nn.Embedding(len(KINDS), width)
        self.layers = nn.ModuleList(BoardGINE(width) for _ in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (batch, 8, 8, 8) to (batch, 2 D)."""
        squares = expand_planes(x).flatten(2).permute(2, 0, 1)
        h = self.nodes(F.pad(squares, (0, 0, 0, 0, 0, 1)))  # nodes come first, so that a sum over them is one product
        for layer, norm in zip(self.layers, self.norms, strict=True):
            h = F.relu(norm(layer(h, self.adjacency, self.edges.weight)))
        return torch.cat([h.mean(0), h.amax(0)], 1)
