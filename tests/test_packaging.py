"""What is in the wheel, what importing costs, and that neither needs more than torch and numpy."""

import configparser
import functools
import importlib.metadata
import json
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

import archzoo
from tests.helpers import HEAVY, REPOSITORY, run_python, without

SITE_PACKAGES = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]

# --- The wheel --------------------------------------------------------------------------------------------------------


def need(*distributions: str) -> None:
    """Skips where a tool is not installed; asked of the metadata, for importing setuptools replaces distutils."""
    for name in distributions:
        try:
            importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"{name} is not installed")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, so that the checkout stays clean, with the tools that are here: no network."""
    need("build", "setuptools")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for folder in ("archzoo", "kernels", "configs"):
        shutil.copytree(REPOSITORY / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / file, source / file)
    # The default of `build`: a source distribution, then the wheel from that, so that both must be whole.
    command = [sys.executable, "-m", "build", "--no-isolation", "--skip-dependency-check", "--outdir", out, source]
    done = subprocess.run(command, capture_output=True, text=True, cwd=out)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def names(wheel) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


@pytest.fixture(scope="module")
def metadata(wheel, names) -> Path:
    """The unpacked `.dist-info` folder."""
    zipfile.ZipFile(wheel).extractall(wheel.parent / "unpacked")
    (folder,) = (wheel.parent / "unpacked").glob("*.dist-info")
    return folder


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder that the wheel was installed into, without what it depends on."""
    need("pip")
    target = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--no-compile", "--target", target]
    done = subprocess.run([*command, wheel], capture_output=True, text=True, cwd=target)
    assert done.returncode == 0, done.stdout + done.stderr
    return target


def run_installed(installed: Path, code: str, cwd: Path | None = None) -> str:
    """Runs code that sees the installed wheel and no editable install, which could lend it what it lacks.

    `-S` leaves out the `.pth` files of site-packages, and with them the finder of an editable install.
    """
    return run_python(code, options=["-S"], path=[installed, *SITE_PACKAGES], cwd=cwd or installed)


def test_wheel_holds_every_source_file_of_the_checkout(names):
    homes = {"archzoo": "archzoo", "kernels": "archzoo/kernels", "configs": "archzoo/configs"}
    wanted = set()
    for folder, home in homes.items():
        for suffix in ("py", "yaml", "json", "npz", "html", "css", "j2", "typed"):
            for file in (REPOSITORY / folder).rglob(f"*.{suffix}"):
                wanted.add(f"{home}/{file.relative_to(REPOSITORY / folder).as_posix()}")
    assert {"archzoo/py.typed", "archzoo/kernels/__init__.py", "archzoo/layers/linear.py"} <= wanted
    missing = sorted(wanted - names)
    assert not missing, f"not in the wheel: {missing}"


def test_wheel_holds_nothing_else(names):
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"archzoo"}
    assert not [name for name in names if "__pycache__" in name or name.endswith((".pyc", ".so"))]
    assert not [name for name in names if "/tests/" in name or "/benchmarks/" in name]


def test_wheel_is_pure_and_of_this_version(wheel, metadata):
    assert wheel.name == f"archzoo-{archzoo.__version__}-py3-none-any.whl"
    text = (metadata / "METADATA").read_text()
    assert f"\nVersion: {archzoo.__version__}\n" in text
    assert "\nLicense-Expression: Apache-2.0\n" in text
    assert (metadata / "top_level.txt").read_text().split() == ["archzoo"]


def test_wheel_holds_the_licence(metadata):
    (licence,) = metadata.rglob("LICENSE")
    assert licence.read_text() == (REPOSITORY / "LICENSE").read_text()
    assert "Apache License" in licence.read_text()


def test_every_console_script_leads_somewhere(installed, metadata):
    scripts = configparser.ConfigParser()
    scripts.read(metadata / "entry_points.txt")
    for name, target in scripts["console_scripts"].items():
        module, _, function = target.partition(":")
        out = run_installed(installed, f"import {module} as m; print(callable(m.{function}))")
        assert out.strip() == "True", f"{name} = {target}"


def test_installed_kernels_are_archzoos_and_nobody_elses(installed):
    out = run_installed(
        installed,
        "import json, importlib.util, archzoo, archzoo.kernels\n"
        "print(json.dumps([archzoo.__file__, archzoo.kernels.__file__, str(importlib.util.find_spec('kernels'))]))",
    )
    package, kernels, bare = json.loads(out)
    assert Path(package) == installed / "archzoo" / "__init__.py"
    assert Path(kernels) == installed / "archzoo" / "kernels" / "__init__.py"
    assert bare == "None"


@pytest.mark.slow
def test_installed_zoo_has_the_layers_that_the_checkout_has(installed):
    code = "import json, archzoo; print(json.dumps(archzoo.list_layers()))"
    assert run_installed(installed, code) == run_python(code)


# --- The checkout -----------------------------------------------------------------------------------------------------


def test_importing_the_folder_kernels_by_its_bare_name_says_what_to_import():
    code = (
        "try:\n    import kernels\n"
        "except ImportError as error:\n    print(error)\n"
        "else:\n    raise AssertionError(kernels)\n"
    )
    out = run_python(code, cwd=REPOSITORY)
    assert "'archzoo.kernels'" in out
    assert "imported as 'kernels'" in out
    assert "from archzoo import kernels" in out


def test_every_package_folder_is_packaged():
    """A new sub-package that nobody adds to pyproject.toml would be missing from the wheel only."""
    listed = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {"archzoo", "archzoo.kernels"}
    for root, package in ((REPOSITORY / "archzoo", "archzoo"), (REPOSITORY / "kernels", "archzoo.kernels")):
        for file in root.rglob("__init__.py"):
            found.add(".".join([package, *file.parent.relative_to(root).parts]))
    assert found <= set(listed)


# --- What an import loads ---------------------------------------------------------------------------------------------


WATCHED = ("torch", "numpy", "torch._dynamo", "torch._inductor", "sympy", *HEAVY)


@functools.cache
def loaded_by(code: str) -> frozenset[str]:
    """Which of the watched packages are loaded after the code ran."""
    return frozenset(run_python(f"import sys\n{code}\nprint(*(p for p in {WATCHED!r} if p in sys.modules))").split())


def test_importing_archzoo_alone_loads_not_even_torch():
    assert loaded_by("import archzoo; archzoo.__version__") == set()


@pytest.mark.parametrize(
    "code",
    [
        pytest.param("import archzoo.layers; dir(archzoo.layers)", id="dir", marks=pytest.mark.slow),
        pytest.param("import archzoo; archzoo.list_layers()", id="list"),
    ],
)
def test_looking_at_the_layers_loads_torch_and_nothing_heavy(code):
    """Neither the packages of the training side nor torch's compiler: what is loaded is what torch itself loads."""
    assert loaded_by(code) == loaded_by("import torch")


def test_the_zoo_works_without_any_optional_package():
    """Every layer is built, used and differentiated where nothing but torch and numpy can be imported."""
    run_python(
        without(HEAVY) + "import torch, archzoo\n"
        "sizes = {'linear': ((8, 12), (5, 8)), 'conv2d': ((8, 12, 3), (2, 8, 5, 5)), 'mixer': ((16,), (2, 6, 16))}\n"
        "names = archzoo.list_layers()\n"
        "assert 'linear' in names\n"
        "for name in names:\n"
        "    kind = archzoo.registry.get_layer(name).kind\n"
        "    if kind in sizes:\n"
        "        args, shape = sizes[kind]\n"
        "        archzoo.create_layer(name, *args)(torch.randn(shape)).sum().backward()\n"
        "    archzoo.card(name)\n"
    )


@pytest.mark.slow
def test_numpy_is_needed_by_no_layer():
    run_python(
        without(("numpy", *HEAVY)) + "import warnings; warnings.simplefilter('ignore')\n"
        "import torch, archzoo\n"
        "for name in archzoo.list_layers(kind='linear'):\n"
        "    archzoo.create_layer(name, 8, 12)(torch.randn(5, 8)).sum().backward()\n"
    )


@pytest.mark.slow
def test_a_connectome_says_that_it_needs_numpy():
    run_python(
        without(("numpy",)) + "import warnings; warnings.simplefilter('ignore')\n"
        "import archzoo\n"
        "try:\n"
        "    archzoo.Connectome.generate()\n"
        "except ImportError as error:\n"
        "    assert 'pip install numpy' in str(error), error\n"
        "else:\n"
        "    raise SystemExit('made without numpy')\n"
    )
