"""A swapped model of one's own, stored in a folder by huggingface_hub, comes back with what was swapped."""

import json

import pytest
import torch
from torch import nn

from archzoo.hub import HubMixin
from archzoo.layers.kan import KANLinear
from archzoo.layers.phm import PHMLinear


class Net(nn.Module, HubMixin):
    def __init__(self, width: int = 16, depth: int = 2):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, width), nn.Linear(width, 8)) for _ in range(depth))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


class Anything(Net):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)


@pytest.mark.parametrize("cls", [Net, Anything])
def test_swaps_are_stored_and_done_again(cls, tmp_path):
    net = cls(width=24, depth=1).eval()
    net.swap({"blocks.*": None, "head": ("phm", {"learn_rule": False})}, phm={"n": 2})
    net.swap({"blocks.*.?": "kan"}, match="params")
    net.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert (stored["width"], stored["depth"], len(stored["archzoo_swaps"])) == (24, 1, 2)
    state = torch.get_rng_state()
    loaded = cls.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert [type(layer) for layer in (*loaded.blocks[0], loaded.head)] == [KANLinear, KANLinear, PHMLinear]
    x = torch.randn(3, 8)
    assert torch.equal(loaded(x), net(x))
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == stored


def test_a_model_that_started_from_its_weights_comes_back(tmp_path):
    net = Net().eval()
    report = net.swap({"blocks.*.?": "kan"}, init="from_original", calibration=torch.randn(4, 8))
    assert {row.start for row in report.swaps} != {"fresh"}
    net.save_pretrained(tmp_path)
    x = torch.randn(3, 8)
    assert torch.equal(Net.from_pretrained(tmp_path)(x), net(x))


def test_a_dry_run_is_not_stored_and_a_model_without_swaps_is_as_ever(tmp_path):
    net = Net().eval()
    net.swap({"head": "kan"}, dry_run=True)
    net.save_pretrained(tmp_path)
    assert "archzoo_swaps" not in json.loads((tmp_path / "config.json").read_text())
    x = torch.randn(3, 8)
    assert torch.equal(Net.from_pretrained(tmp_path)(x), net(x))


def test_other_weights_are_refused(tmp_path):
    net = Net()
    net.swap({"head": "kan"})
    net.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["archzoo_swaps"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="head"):
        Net.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("rules", "options", "error", "message"),
    [
        ({nn.Linear: "kan"}, {}, TypeError, "only globs over names can be stored"),
        ({"head": lambda module: module}, {}, TypeError, "cannot be stored as JSON"),
        ({"": "kan"}, {}, ValueError, "replaces the model itself"),
        ({"head": "kan"}, {"match": "flops"}, ValueError, "match='flops': must be 'params' or None"),
        ({"haed": "kan"}, {}, ValueError, "did you mean 'head'"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_cannot_be_stored_is_refused(rules, options, error, message):
    net = Net()
    with pytest.raises(error, match=message):
        net.swap(rules, **options)
    assert isinstance(net.head, nn.Linear)
    assert "archzoo_swaps" not in net._hub_mixin_config
