"""Encoders of chess positions and the trainer's model `chess_bpu`."""

import os
from pathlib import Path

import pytest
import torch
import yaml
from torch.nn import functional as F

from archzoo.budget import count_parameters
from archzoo.layers.bpu import BPU
from archzoo.models.bpu import FrozenMiddleMLP
from archzoo.models.chess_bpu import chess_bpu
from archzoo.models.chess_encoders import ENCODERS, GraphEncoder
from archzoo.models.chess_graph import KINDS, board_adjacency, edge_kind
from archzoo.models.chess_planes import expand_planes
from archzoo.models.model import LayerFactory
from tests.helpers import REPOSITORY

LARVA = Path(os.environ.get("ARCHZOO_DATA", ""), "larva_connectome.npz")
NEEDS_LARVA = pytest.mark.skipif(not LARVA.is_file(), reason="needs larva_connectome.npz in ARCHZOO_DATA")
EXPERIMENT = yaml.safe_load((REPOSITORY / "configs" / "experiment" / "chess_bpu.yaml").read_text())
CHESS = EXPERIMENT["recipes"]["bpu"]["layer"]


def build(layer="bpu", seed=0, shape=(8, 8, 8), layer_options=None, **options):
    torch.manual_seed(seed)
    settings = CHESS | (layer_options or {}) if layer == "bpu" else layer_options
    return chess_bpu(LayerFactory(layer, settings), shape, 2, **{"connectome": "generated"} | options)


def positions(count=4, seed=0, dtype=torch.float32):
    """Boards of some 30 pieces, legal or not."""
    generator = torch.Generator().manual_seed(seed)
    squares = torch.randint(-12, 13, (count, 8, 8), generator=generator)
    x = torch.zeros(count, 8, 8, 8, dtype=dtype)
    for kind in range(6):
        x[:, kind] = (squares == kind + 1).to(dtype) - (squares == -kind - 1).to(dtype)
    for rank, file, sign in ((0, 0, 1), (0, 7, 1), (7, 0, -1), (7, 7, -1)):
        x[:, 6, rank, file] = sign * torch.randint(2, (count,), generator=generator).to(dtype)
    x[torch.arange(count), 7, 5, torch.randint(8, (count,), generator=generator)] = 1
    return x


SIZES = {"vector": (404, 0), "convolutions": (204, 1640), "residual": (256, 1_850_560), "graph": (256, 121_600)}


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_have_their_sizes_and_take_each_position_by_itself(name):
    torch.manual_seed(0)
    encoder = ENCODERS[name]().eval()
    x = positions()
    y = encoder(x)
    assert (encoder.out_features, count_parameters(encoder)) == SIZES[name]
    assert y.shape == (4, encoder.out_features)
    assert encoder(x[:0]).shape == (0, encoder.out_features)
    for number in range(4):
        torch.testing.assert_close(encoder(x[number : number + 1])[0], y[number])
    assert (y[0] - y[1]).abs().max() > 1e-3


def test_a_graph_network_is_exported_for_any_batch():
    torch.manual_seed(0)
    encoder, x = GraphEncoder(width=8).eval(), positions(5)
    batch = ({0: torch.export.Dim("batch", min=2)},)
    exported = torch.export.export(encoder, (x[:3],), dynamic_shapes=batch).module()
    torch.testing.assert_close(exported(x), encoder(x))


@pytest.mark.parametrize("name", [name for name in ENCODERS if name != "vector"])
def test_all_that_an_encoder_learns_has_a_gradient(name):
    torch.manual_seed(0)
    encoder = ENCODERS[name]()
    encoder(positions()).square().sum().backward()
    assert [key for key, weight in encoder.named_parameters() if weight.grad is None or not weight.grad.any()] == []


def test_vector_is_pieces_then_castling_then_en_passant():
    x = torch.zeros(1, 8, 8, 8)
    x[0, 0, 1, 4], x[0, 5, 7, 4] = 1, -1
    x[0, 6, 0, 7], x[0, 6, 7, 0], x[0, 7, 5, 3] = 1, -1, 1
    expected = torch.zeros(404)
    expected[12], expected[5 * 64 + 60] = 1, -1
    expected[384:388] = torch.tensor([1.0, 0.0, 0.0, 1.0])
    expected[388 + 8 + 3] = 1
    assert torch.equal(ENCODERS["vector"]()(x)[0], expected)


def test_planes_of_the_starting_position():
    order = [3, 1, 2, 4, 5, 2, 1, 3]
    x = torch.zeros(1, 8, 8, 8)
    x[0, order, 0, range(8)], x[0, order, 7, range(8)] = 1, -1
    x[0, 0, 1], x[0, 0, 6] = 1, -1
    x[0, 6, 0, [0, 7]], x[0, 6, 7, [0]] = 1, -1
    planes = expand_planes(x)[0]
    assert planes.shape == (24, 8, 8)
    assert planes[:12].sum((1, 2)).tolist() == [8, 2, 2, 2, 1, 1] * 2
    assert planes[0, 1].sum() == planes[6, 6].sum() == 8
    assert [plane.unique().tolist() for plane in planes[12:16]] == [[1], [1], [0], [1]]
    assert planes[16].sum() == 0
    assert [planes[index].sum() for index in (17, 18, 19)] == [16, 16, 32]
    assert (planes[20, 0] == -1).all()
    assert (planes[21, :, 7] == 1).all()
    assert planes[22, 0].tolist() == [1, 0] * 4  # a1 is dark
    assert (planes[23] == 1).all()


def test_a_convolution_reads_windows_of_its_size():
    torch.manual_seed(0)
    encoder, x = ENCODERS["convolutions"](), positions()
    corner = (encoder.filters[2].weight[0] * x[0, :, :3, :3]).sum() + encoder.filters[2].bias
    torch.testing.assert_close(encoder(x)[0, 64 + 49], F.relu(corner)[0])
    whole = (encoder.filters[7].weight[0] * x[0]).sum() + encoder.filters[7].bias
    torch.testing.assert_close(encoder(x)[0, 203], F.relu(whole)[0])


def test_the_graph_joins_squares_as_a_queen_or_a_knight_moves():
    chess = pytest.importorskip("chess")
    adjacency = board_adjacency()
    assert adjacency.sum() == 1920
    assert adjacency.sum(0).max() == 1
    for sender in range(64):
        board = chess.Board(None)
        moves = set()
        for piece in (chess.QUEEN, chess.KNIGHT):
            board.set_piece_at(sender, chess.Piece(piece, chess.WHITE))
            moves |= set(board.attacks(sender))
        assert {receiver for receiver in range(64) if edge_kind(sender, receiver) is not None} == moves
    e4 = 28

    def kind(receiver):
        return KINDS[edge_kind(e4, receiver)]

    assert [kind(e4 + 8), kind(e4 - 8), kind(e4 + 1), kind(e4 - 1)] == ["step " + way for way in
            ("forward", "back", "sideways", "sideways")]  # fmt: skip
    assert [kind(e4 + 7), kind(e4 - 9), kind(e4 + 24), kind(e4 - 21)] == [
        "step diagonally forward", "step diagonally back", "farther forward", "farther diagonally back"]  # fmt: skip
    assert [kind(e4 + 17), kind(64), KINDS[edge_kind(64, e4)]] == ["knight", "global", "global"]


def test_the_graph_network_is_the_sum_over_its_edges():
    torch.manual_seed(0)
    encoder = GraphEncoder(width=8).double()
    x = positions(2, dtype=torch.float64)
    rows = []
    for planes in expand_planes(x):
        h = [encoder.nodes(planes[:, node // 8, node % 8] if node < 64 else planes.new_zeros(24)) for node in range(65)]
        for layer, norm in zip(encoder.layers, encoder.norms, strict=True):
            new = []
            for i in range(65):
                total = h[i]
                for j in range(65):
                    kind = edge_kind(j, i)
                    if kind is not None:
                        total = total + F.relu(h[j] + layer.message(encoder.edges.weight[kind]))
                new.append(F.relu(norm(layer.update(total))))
            h = new
        rows.append(torch.cat([torch.stack(h).mean(0), torch.stack(h).max(0).values]))
    torch.testing.assert_close(encoder(x), torch.stack(rows))


@NEEDS_LARVA
@pytest.mark.parametrize(
    ("encoder", "expected"),
    [("vector", 174_952), ("convolutions", 90_592), ("graph", 232_912), ("residual", 1_961_872)],
)
def test_contestants_learn_as_much_as_the_papers(encoder, expected):
    nets = [build(layer, encoder=encoder, connectome="larva", data_dir=LARVA.parent) for layer in ("bpu", "linear")]
    assert [count_parameters(net) for net in nets] == [expected, expected]
    assert [type(net.core) for net in nets] == [BPU, FrozenMiddleMLP]
    assert nets[0].core.connectome.pool_sizes == (430, 2122, 400)


def test_the_core_never_learns_and_the_encoder_does():
    net = build()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.5)
    net(positions()).square().sum().backward()
    optimizer.step()
    same = [key for key, value in net.state_dict().items() if torch.equal(before[key], value)]
    assert same == ["core.edge_weight", "core.edge_pre", "core.edge_post"]


def test_the_experiments_radius_keeps_the_first_loss_below_a_nat_and_upstreams_does_not():
    target = torch.full((64, 2), 0.5)

    def loss(**options):
        return F.cross_entropy(build(layer_options=options)(positions(64)), target)

    assert loss() < 1
    assert loss(spectral_radius=1.893) > 2


def test_records_and_picture_are_the_connectomes():
    net = build()
    assert "not measured" in net.summarize()["wiring"]
    assert list(net.pictures(None)) == ["wiring"]
    assert build(output=None).core.connectome.pool_sizes[2] == 218


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder": "convolution"}, "encoder='convolution': did you mean 'convolutions'"),
        ({"shape": (1, 28, 28)}, r"takes chess positions \(8, 8, 8\), as of task chess_moves, not .* \(1, 28, 28\)"),
        ({"layer": "conv2d"}, "layer='conv2d': must be 'bpu'"),
        ({"depth": 2}, "depth=2: must be 1"),
        ({"output": ["RGN"]}, r"output=\('RGN',\): has no use with connectome='generated'"),
        ({"output": []}, r"output=\(\): has no use"),
    ],
    ids=["encoder", "shape", "layer", "depth", "output", "no output"],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)
