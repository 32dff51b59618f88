"""KANLinear to and from pykan, scipy and matplotlib."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from archzoo.kernels.kan_spline import cox_de_boor
from archzoo.layers.kan import KANLinear
from tests.helpers import rms_error
from tests.layers.kan_layers import DOUBLE, generic, samples


class FakePykanLayer:
    """What `from_pykan` reads of a kan.KANLayer, without pykan."""

    def __init__(self, base_fun=None, masked: bool = True):
        self.k, self.grid_eps, self.base_fun = 2, 0.1, base_fun or nn.SiLU()
        self.coef = torch.randn(3, 4, 6, **DOUBLE)
        self.grid = torch.linspace(-2, 2, 9, **DOUBLE).expand(3, -1)
        self.scale_base, self.scale_sp = torch.randn(2, 3, 4, **DOUBLE)
        self.mask = (torch.rand(3, 4) > 0.4).double() if masked else torch.ones(3, 4, **DOUBLE)


@pytest.mark.parametrize("base_fun", [nn.SiLU(), nn.Identity(), lambda x: x * 0.0], ids=["silu", "identity", "zero"])
def test_from_pykan_reads_every_field(base_fun):
    theirs = FakePykanLayer(base_fun)
    layer, x = KANLinear.from_pykan(theirs), samples(20, 3)
    basis = torch.stack([cox_de_boor(x[:, i][None], theirs.grid[i : i + 1], 2)[0] for i in range(3)])  # (I, K, N)
    spline = torch.einsum("ikn,iok->nio", basis, theirs.coef) * theirs.scale_sp
    want = (theirs.mask * (theirs.scale_base * base_fun(x).unsqueeze(-1) + spline)).sum(1)
    assert rms_error(layer(x), want) < 1e-12
    assert layer.grid_eps == 0.1
    assert layer.spline_weight.is_contiguous()
    assert not layer.bias.any()
    assert torch.equal(layer.mask, theirs.mask.t())
    assert KANLinear.from_pykan(FakePykanLayer(masked=False)).mask is None
    assert KANLinear.from_pykan(FakePykanLayer()).base_activation is not None
    theirs.k = 1
    with pytest.raises(ValueError, match="do not belong together"):
        KANLinear.from_pykan(theirs)


@pytest.mark.filterwarnings("ignore")  # pykan's own, at import and in use
def test_to_and_from_pykan_itself():
    kan = pytest.importorskip("kan", reason="pykan 0.2.8 is an optional extra, for this check alone")
    torch.manual_seed(0)
    theirs = kan.KANLayer(in_dim=3, out_dim=4, num=5, k=3)
    x = torch.rand(50, 3) * 2 - 1
    theirs.update_grid_from_samples(x)
    theirs.mask.data = (torch.rand(3, 4) > 0.3).float()
    layer = KANLinear.from_pykan(theirs)
    assert rms_error(layer(x), theirs(x)[0]) < 2e-6
    assert rms_error(layer.edge_functions(x), theirs(x)[2]) < 2e-6
    other = kan.KANLayer(in_dim=3, out_dim=4, num=5, k=3)
    other.load_state_dict(layer.to_pykan_state_dict())
    assert rms_error(other(x)[0], theirs(x)[0]) < 1e-6
    ours = KANLinear(3, 4, False, scale_noise=1.0)
    other.load_state_dict(ours.to_pykan_state_dict())
    assert rms_error(other(x)[0], ours(x)) < 2e-6
    bare = KANLinear(3, 4, False, scale_noise=1.0, base_activation=None)
    other.load_state_dict(bare.to_pykan_state_dict())
    assert rms_error(other(x)[0], bare(x)) < 2e-6


@pytest.mark.filterwarnings("ignore")  # pykan's own
def test_activation_regularization_agrees_with_pykan_itself(tmp_path):
    kan = pytest.importorskip("kan", reason="pykan 0.2.8 is an optional extra, for this check alone")
    model = kan.KAN(width=[3, 4], grid=5, k=3, seed=0, auto_save=False, ckpt_path=str(tmp_path), symbolic_enabled=False)
    x = torch.rand(50, 3) * 2 - 1
    model(x)
    theirs = model.get_reg("edge_forward_spline_n", 1.0, 2.0, 0.0, 0.0)
    ours = KANLinear.from_pykan(model.act_fun[0]).activation_regularization(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("adaptive", [False, True], ids=["uniform", "adaptive"])
def test_to_scipy_is_the_spline_branch(adaptive):
    interpolate = pytest.importorskip("scipy.interpolate", reason="scipy is optional")
    layer = generic(3, 4, adaptive=adaptive, standalone_scale=True, base_activation=None)
    spline = interpolate.BSpline(*layer.to_scipy(2, 1), extrapolate=False)
    x = samples(50, 3, 0.9)
    phi = layer.edge_functions(x)[:, 2, 1]
    assert rms_error(torch.from_numpy(spline(x[:, 1].numpy())), phi) < 1e-13
    layer.prune_edges_(0.5, torch.zeros(4, 3))
    assert not layer.to_scipy(2, 1)[1].any()
    with pytest.raises(ValueError, match="o=4: must lie from 0 to 3"):
        layer.to_scipy(4, 0)


def test_plot_edge_draws_the_function():
    matplotlib = pytest.importorskip("matplotlib", reason="matplotlib is optional")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    layer = generic(3, 4)
    axes = layer.plot_edge(2, 1)
    x, phi = (torch.from_numpy(values) for values in axes.lines[0].get_data())
    points = torch.zeros(len(x), 3, **DOUBLE)
    points[:, 1] = x
    torch.testing.assert_close(layer.edge_functions(points)[:, 2, 1].detach(), phi)
    assert (x[0], x[-1]) == (layer.grid[1, 3], layer.grid[1, 8])
    assert layer.plot_edge(0, 0, axes) is axes
    pyplot.close("all")
    with pytest.raises(ValueError, match="i=3: must lie from 0 to 2"):
        layer.plot_edge(0, 3)


def test_matplotlib_is_imported_for_plots_alone():
    code = "import sys, archzoo.layers.kan; assert not {'matplotlib', 'scipy', 'kan'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
