"""Names -> classes and cards: registering, looking up, misspelling, and layers that other packages bring."""

import pkgutil
import re
import sys
import textwrap

import pytest
from torch import nn

import archzoo
from archzoo import registry
from archzoo.registry import Card, Registry, check_arguments, get_layer, layer_options, register_layer
from tests.helpers import run_python

CARD = Card("Title", "Authors", 2026, "2401.00001", "y = 2 W x", "best of all", "nothing yet")


@pytest.fixture(autouse=True)
def _layers_of_one_test(monkeypatch):
    """What a test registers is gone after it."""
    archzoo.list_layers()
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))


class Toy(nn.Linear):
    def __init__(self, in_features, out_features, bias=True, *, grid_size=5, spline_order=3, device=None, dtype=None):
        super().__init__(in_features, out_features, bias, device, dtype)
        self.options = grid_size, spline_order


# --- Registering ------------------------------------------------------------------------------------------------------


def test_a_registered_layer_is_listed_built_and_described():
    assert register_layer("toy", kind="linear", card=CARD, nonlinear=True)(Toy) is Toy
    assert "toy" in archzoo.list_layers()
    layer = archzoo.create_layer("toy", 3, 4, grid_size=8)
    assert type(layer) is Toy
    assert layer.options == (8, 3)
    assert archzoo.card("toy") is CARD
    entry = get_layer("toy")
    assert (entry.name, entry.cls, entry.kind, entry.card, entry.nonlinear) == ("toy", Toy, "linear", CARD, True)


def test_a_layer_is_linear_unless_it_says_otherwise():
    register_layer("toy", kind="linear", card=CARD)(Toy)
    assert get_layer("toy").nonlinear is False


def test_a_taken_name_is_refused_and_names_its_holder():
    register_layer("toy", kind="linear", card=CARD)(Toy)
    with pytest.raises(ValueError, match=r"name='toy'.*test_registry\.Toy.*replace=True"):
        register_layer("toy", kind="linear", card=CARD)(nn.Linear)
    assert get_layer("toy").cls is Toy


def test_a_name_can_be_replaced_on_purpose():
    register_layer("toy", kind="linear", card=CARD)(Toy)
    register_layer("toy", kind="mixer", card=CARD, replace=True)(nn.Identity)
    assert get_layer("toy").cls is nn.Identity
    assert "toy" not in archzoo.list_layers(kind="linear")


@pytest.mark.parametrize("name", ["Toy", "to-y", "2toy", "", "to y", "toy.conv"])
def test_a_malformed_name_is_refused(name):
    with pytest.raises(ValueError, match=rf"name={name!r}.*'fast_kan'"):
        register_layer(name, kind="linear", card=CARD)


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match=r"kind='conv3d'.*'conv2d'"):
        register_layer("toy", kind="conv3d", card=CARD)
    with pytest.raises(ValueError, match=r"kind='conv3d'.*'conv2d'"):
        archzoo.list_layers(kind="conv3d")


# --- Looking up -------------------------------------------------------------------------------------------------------


def test_list_is_sorted_and_filters_by_kind_and_glob():
    for name, kind in (("zz_toy", "linear"), ("aa_toy", "mixer"), ("mm_toy", "linear")):
        register_layer(name, kind=kind, card=CARD)(Toy)
    names = archzoo.list_layers()
    assert names == sorted(names)
    assert "linear" in names
    assert archzoo.list_layers(pattern="*_toy") == ["aa_toy", "mm_toy", "zz_toy"]
    assert archzoo.list_layers(kind="linear", pattern="*_toy") == ["mm_toy", "zz_toy"]
    assert archzoo.list_layers("mixer", "*_toy") == ["aa_toy"]
    assert archzoo.list_layers(pattern="*_TOY") == []
    by_kind = [name for kind in registry.KINDS for name in archzoo.list_layers(kind=kind)]
    assert sorted(by_kind) == names


@pytest.mark.parametrize("look_up", [archzoo.create_layer, archzoo.card, get_layer, layer_options])
def test_a_misspelt_name_is_answered_with_the_nearest(look_up):
    with pytest.raises(ValueError, match=r"layer 'linaer' is not registered; did you mean 'linear'"):
        look_up("linaer")


def test_a_name_like_no_other_is_answered_with_all():
    with pytest.raises(ValueError, match=r"choose one of .*\blinear\b"):
        archzoo.create_layer("qqqqqqqq", 3, 4)


def test_an_unknown_argument_is_refused_with_the_nearest():
    register_layer("toy", kind="linear", card=CARD)(Toy)
    with pytest.raises(TypeError, match=r"layer 'toy' has no argument grid_sise=8; did you mean 'grid_size'"):
        archzoo.create_layer("toy", 3, 4, grid_sise=8)


def test_a_missing_or_surplus_argument_is_refused_with_the_signature():
    register_layer("toy", kind="linear", card=CARD)(Toy)
    with pytest.raises(TypeError, match=r"layer 'toy'.*'out_features'.*in_features, out_features, bias=True"):
        archzoo.create_layer("toy", 3)
    with pytest.raises(TypeError, match=r"layer 'toy'.*too many positional"):
        archzoo.create_layer("toy", 3, 4, True, 8)
    with pytest.raises(TypeError, match=r"multiple values.*in_features"):
        archzoo.create_layer("toy", 3, in_features=4, out_features=4)


def test_a_layers_own_refusals_come_through_unchanged():
    class Picky(nn.Module):
        def __init__(self, in_features, out_features):
            raise ValueError("in_features=3: must be even")

    register_layer("picky", kind="linear", card=CARD)(Picky)
    with pytest.raises(ValueError, match=r"^in_features=3: must be even$"):
        archzoo.create_layer("picky", 3, 4)


def test_arguments_of_a_callable_that_takes_any_are_not_second_guessed():
    def anything(a, **rest): ...

    check_arguments("it", anything, (1,), {"whatever": 2})
    with pytest.raises(TypeError, match="it: missing a required argument: 'a'"):
        check_arguments("it", anything, (), {"whatever": 2})


def test_options_are_the_keyword_only_ones_with_their_defaults():
    register_layer("toy", kind="linear", card=CARD)(Toy)
    assert layer_options("toy") == {"grid_size": 5, "spline_order": 3}
    assert layer_options("linear") == {}


def test_a_card_prints_its_source_and_what_was_reproduced():
    assert str(CARD).splitlines()[0] == "Title"
    assert "Authors, 2026, arXiv:2401.00001" in str(CARD)
    assert "y = 2 W x" in str(CARD)
    assert re.search(r"reproduced: +nothing yet", str(CARD))
    assert "arXiv:" not in str(Card("T", "A", 1986, "", "y = x", "-", "-"))
    with pytest.raises(AttributeError):
        CARD.year = 2027


# --- The package's names ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", archzoo.__all__)
def test_every_public_name_exists(name):
    assert getattr(archzoo, name) is not None
    assert name in dir(archzoo)


def test_an_unknown_name_is_an_attribute_error_that_names_it():
    assert not hasattr(archzoo, "no_such_name")
    with pytest.raises(AttributeError, match="module 'archzoo' has no attribute 'no_such_name'"):
        archzoo.no_such_name  # noqa: B018
    with pytest.raises(AttributeError, match=r"module 'archzoo\.layers' has no attribute 'NoSuchLinear'"):
        archzoo.layers.NoSuchLinear  # noqa: B018


def test_layer_classes_are_in_dir():
    ours = {get_layer(name).cls for name in archzoo.list_layers()}
    names = {cls.__name__ for cls in ours if cls.__module__.startswith("archzoo.layers.")}
    assert names <= set(dir(archzoo))
    assert names <= set(dir(archzoo.layers))
    assert "nn" not in dir(archzoo.layers), "what a layer file imports is not its own"


# --- Registry: the same for tasks, models and what else has names -----------------------------------------------------


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package whose two modules register into `shapes`, as `archzoo.tasks` does."""
    folder = tmp_path / "toy_shapes"
    folder.mkdir()
    (folder / "__init__.py").write_text(
        "from archzoo.registry import Registry\nshapes = Registry('shape', 'toy_shapes')\n"
    )
    for name in ("circle", "square"):
        (folder / f"{name}.py").write_text(
            f"from toy_shapes import shapes\n@shapes.register({name!r})\n"
            f"def {name}(size, *, colour='red'):\n    return {name!r}, size, colour\n"
        )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "toy_shapes"]:
        del sys.modules[name]


def test_registry_finds_what_the_modules_of_its_package_register(package):
    from toy_shapes import shapes

    assert isinstance(shapes, Registry)
    assert shapes.names() == ["circle", "square"]
    assert shapes.get("circle")(3) == ("circle", 3, "red")
    assert shapes.create("square", 2, colour="blue") == ("square", 2, "blue")


def test_registry_refuses_what_it_does_not_know(package):
    from toy_shapes import shapes

    with pytest.raises(ValueError, match="shape 'cirle' is not registered; did you mean 'circle'"):
        shapes.get("cirle")
    with pytest.raises(ValueError, match="shape 'sqare' is not registered; did you mean 'square'"):
        shapes.create("sqare", 2)
    with pytest.raises(TypeError, match="shape 'circle' has no argument color='blue'; did you mean 'colour'"):
        shapes.create("circle", 2, color="blue")
    with pytest.raises(ValueError, match="name='circle': this shape is already registered"):
        shapes.register("circle")(print)


def test_registry_fails_again_when_a_module_of_its_package_does(package):
    broken = "from toy_shapes import shapes\nshapes.register('blob')(lambda: None)\n1 / 0\n"
    (package / "broken.py").write_text(broken)
    from toy_shapes import shapes

    for _ in range(2):  # a list without the broken module's items must never come out
        with pytest.raises(ZeroDivisionError):
            shapes.names()
    (package / "broken.py").write_text("")
    assert shapes.names() == ["circle", "square"]


# --- Layers of other packages -----------------------------------------------------------------------------------------


@pytest.fixture
def plug_in(tmp_path):
    """Writes an installed package, as pip leaves it, that declares layers; returns the folder for sys.path."""

    def write(package: str, code: str) -> str:
        (tmp_path / f"{package}.py").write_text(textwrap.dedent(code))
        info = tmp_path / f"{package}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[archzoo.layers]\n{package} = {package}\n")
        return str(tmp_path)

    return write


GOOD = """
from torch import nn
from archzoo import Card, register_layer

@register_layer("{name}", kind="linear", card=Card("T", "A", 2026, "", "y = 2 W x", "-", "-"))
class Toy(nn.Linear):
    pass
"""


def test_layers_of_an_installed_package_are_in_the_zoo(plug_in):
    path = plug_in("toy_package", GOOD.format(name="toy_of_another"))
    out = run_python(
        "import archzoo, sys\n"
        "assert 'toy_package' not in sys.modules\n"
        "print(archzoo.create_layer('toy_of_another', 3, 4))\n"
        "print('toy_of_another' in archzoo.list_layers(kind='linear'), archzoo.card('toy_of_another').year)",
        path=[path],
        options=["-W", "error"],
    )
    assert out.splitlines() == ["Toy(in_features=3, out_features=4, bias=True)", "True 2026"]


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("import no_such_package_at_all", "ModuleNotFoundError"),
        pytest.param(
            GOOD.format(name="half_there") + "raise RuntimeError('out of order')",
            "out of order",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            GOOD.format(name="linear"), "name='linear': already registered by torch.nn", marks=pytest.mark.slow
        ),
    ],
    ids=["missing_import", "raises", "takes_a_taken_name"],
)
def test_a_broken_package_warns_once_and_leaves_the_zoo_standing(plug_in, fault, says):
    path = plug_in("broken_package", fault)
    plug_in("toy_package", GOOD.format(name="toy_of_another"))
    out = run_python(
        "import archzoo, warnings\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    for _ in range(3):\n"
        "        names = archzoo.list_layers()\n"
        "    archzoo.create_layer('linear', 3, 4), archzoo.card('toy_of_another')\n"
        "print({'linear', 'toy_of_another'} <= set(names) and 'half_there' not in names)\n"
        "print(len(caught), *(w.message for w in caught))",
        path=[path],
    )
    assert out.splitlines()[0] == "True"
    assert out.splitlines()[1].startswith("1 ")
    assert "'broken_package'" in out
    assert says in out


@pytest.mark.slow
def test_a_broken_layer_file_of_ours_fails_each_time_with_its_own_error(tmp_path):
    """No zoo with a part missing: neither the second look-up nor an attribute may hide what went wrong in the first."""
    (tmp_path / "zz_broken.py").write_text(GOOD.format(name="zz_broken") + "\nnn.no_such_thing\n")
    out = run_python(
        "import archzoo, archzoo.layers\n"
        f"archzoo.layers.__path__.append({str(tmp_path)!r})\n"
        "looks = [archzoo.list_layers, archzoo.list_layers, lambda: archzoo.KANLinear, lambda: archzoo.KANLinear,\n"
        "         lambda: archzoo.create_layer('linear', 3, 4), lambda: dir(archzoo)]\n"
        "for look in looks:\n"
        "    try:\n"
        "        look()\n"
        "        print('no error')\n"
        "    except Exception as error:\n"
        "        print(type(error).__name__, error)\n"
    )
    assert len(out.splitlines()) == 6
    for line in out.splitlines():
        assert "module 'torch.nn' has no attribute 'no_such_thing'" in line, out


def test_no_two_layer_files_export_the_same_name():
    homes: dict[str, str] = {}
    for module in pkgutil.iter_modules(archzoo.layers.__path__, "archzoo.layers."):
        for name in dir(archzoo.layers):
            if getattr(vars(sys.modules[module.name]).get(name), "__module__", None) == module.name:
                assert homes.setdefault(name, module.name) == module.name, name
