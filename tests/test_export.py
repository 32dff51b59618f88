"""Every swapped model goes through torch.export, safetensors and ONNX."""

import re

import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import nn

import archzoo
from archzoo.export import export_onnx
from tests.helpers import run_python, without

LAYERS = [(kind, name) for kind in ("linear", "conv2d") for name in archzoo.list_layers(kind)]
SAMPLE = ("kan", "aptx", "paon", "phm", "nmu", "kan_conv2d", "paon_conv2d", "phm_conv2d")  # one of each op
SAMPLED = [pytest.param(kind, name, marks=[] if name in SAMPLE else pytest.mark.slow, id=name) for kind, name in LAYERS]


def swapped(kind, name):
    if kind == "linear":
        model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(3, 8)
    else:
        model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1))
        x = torch.randn(2, 4, 6, 6)
    archzoo.swap(model, {"0": name})
    return model, x


@pytest.mark.parametrize(("kind", "name"), SAMPLED)
def test_a_swapped_model_is_exported_and_comes_back_from_a_file(kind, name, tmp_path):
    model, x = swapped(kind, name)
    model.eval()
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    torch.testing.assert_close(program.module()(x), model(x))
    torch.testing.assert_close(program.module()(torch.cat([x, x])), model(torch.cat([x, x])))
    save_model(model, str(tmp_path / "model.safetensors"))
    other, _ = swapped(kind, name)
    other.eval()
    load_model(other, str(tmp_path / "model.safetensors"))
    assert torch.equal(other(x), model(x))


def run(path, *inputs):
    runtime = pytest.importorskip("onnxruntime", reason="pip install 'archzoo[onnx]'")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    return torch.from_numpy(session.run(None, dict(zip(names, (x.numpy() for x in inputs), strict=True)))[0])


@pytest.mark.slow
def test_several_layers_in_one_onnx_file(tmp_path):
    pytest.importorskip("onnxscript", reason="pip install 'archzoo[onnx]'")
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=1), nn.Flatten(), nn.Linear(36, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
    )
    archzoo.swap(model, {"0": "paon_conv2d", "2": "rational_kan", "3": "phm", "4": "aptx", "5": "kan"})
    x = torch.randn(2, 4, 3, 3)
    batch = torch.export.Dim("batch")
    assert model.training
    path = export_onnx(model, (x,), tmp_path / "model.onnx", dynamic_shapes=({0: batch},))
    assert model.training
    more = torch.randn(5, 4, 3, 3)
    torch.testing.assert_close(run(path, more), model.eval()(more), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), [pytest.param(*entry, id=entry[1]) for entry in LAYERS])
def test_every_layer_in_an_onnx_file(kind, name, tmp_path):
    pytest.importorskip("onnxscript", reason="pip install 'archzoo[onnx]'")
    model, x = swapped(kind, name)
    path = export_onnx(model, (x,), tmp_path / "model.onnx")
    torch.testing.assert_close(run(path, x), model.eval()(x), rtol=1e-4, atol=1e-5)


def test_an_op_that_onnx_has_not_is_named_with_its_module(tmp_path):
    pytest.importorskip("onnxscript", reason="pip install 'archzoo[onnx]'")

    class Digamma(nn.Module):
        def forward(self, x):
            return torch.special.digamma(x)

    model = nn.Sequential(nn.Linear(2, 2), Digamma())
    words = "model: op aten.special_digamma, which 1 calls, has no equivalent in ONNX"
    with pytest.raises(ValueError, match=re.escape(words)):
        export_onnx(model, (torch.rand(1, 2),), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_without_onnx_it_is_told_how_to_get_it():
    run_python(
        without(("onnxscript",)) + "import torch\nfrom archzoo.export import export_onnx\n"
        "try:\n    export_onnx(torch.nn.Linear(1, 1), (torch.ones(1, 1),), 'x.onnx')\n"
        "except ImportError as error:\n    assert \"pip install 'archzoo[onnx]'\" in str(error), error\n"
        "else:\n    raise SystemExit('exported')\n"
    )
