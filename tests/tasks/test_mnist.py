"""MNIST and Fashion-MNIST: the files are found, downloaded, verified and split; what is wrong is said clearly."""

import dataclasses
import gzip
import hashlib
import http.server
import os
import re
import struct
import threading
import time

import numpy as np
import pytest
import torch

from archzoo.tasks import fashion_mnist, files, mnist
from archzoo.tasks.fashion_mnist import FashionMNIST
from archzoo.tasks.idx import FILES, parse_idx
from archzoo.tasks.mnist import MNIST
from archzoo.tasks.task import DatasetError
from tests.helpers import sampled

DATA = os.environ.get("ARCHZOO_DATA")
IMAGES = np.random.RandomState(0).randint(0, 256, (50, 28, 28)).astype(np.uint8)
LABELS = (np.arange(50) % 10).astype(np.uint8)


def idx(array: np.ndarray) -> bytes:
    head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return gzip.compress(head + array.tobytes(), mtime=0)


CONTENT = dict(zip(FILES, map(idx, (IMAGES[:40], LABELS[:40], IMAGES[40:], LABELS[40:])), strict=True))


@pytest.fixture(autouse=True)
def small_mnist(monkeypatch, request):
    """Fifty images stand in for MNIST, no mirror answers, no data folder is named; tests of the real data excepted."""
    if "real" in request.node.name:
        return
    sha256 = {name: hashlib.sha256(data).hexdigest() for name, data in CONTENT.items()}
    for module in (mnist, fashion_mnist):
        source = dataclasses.replace(module.SOURCE, sha256=sha256, mirrors=("http://127.0.0.1:9/",))
        monkeypatch.setattr(module, "SOURCE", source)
    monkeypatch.delenv("ARCHZOO_DATA", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def write(root, folder="mnist"):
    (root / folder).mkdir()
    for name, data in CONTENT.items():
        (root / folder / name).write_bytes(data)
    return root / folder


@pytest.fixture
def server(monkeypatch):
    """A server that sends `answers[name]`: bytes, a status, or "silence"."""
    answers = dict(CONTENT)
    asked = []
    over = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            answer = answers[self.path.strip("/")]
            if answer == "silence":
                over.wait(30)
                return
            if isinstance(answer, int):
                self.send_error(answer)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
        threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        mirrors = (f"http://127.0.0.1:{made.server_address[1]}/",)
        monkeypatch.setattr(mnist, "SOURCE", dataclasses.replace(mnist.SOURCE, mirrors=mirrors))
        yield answers, asked
        over.set()
        made.shutdown()


@pytest.mark.parametrize(("task", "folder"), [(MNIST, "mnist"), (FashionMNIST, "fashion_mnist")])
def test_validation_is_the_end_of_the_training_images(tmp_path, task, folder):
    write(tmp_path, folder)
    data = task(data_dir=tmp_path, val_size=10)
    assert (len(data.train), len(data.val), len(data.test)) == (30, 10, 10)
    mean, std = (0.1307, 0.3081) if task is MNIST else (0.2860, 0.3530)
    expected = (torch.tensor(IMAGES[30:40]).unsqueeze(1) / 255.0 - mean) / std
    torch.testing.assert_close(data.val.inputs, expected)
    assert data.val.targets.tolist() == LABELS[30:40].tolist()
    assert data.test.targets.tolist() == LABELS[40:].tolist()
    assert data.train.inputs.shape == (30, 1, 28, 28)
    few = task(data_dir=tmp_path, val_size=10, train_size=7)
    assert torch.equal(few.train.inputs, data.train.inputs[:7])
    assert torch.equal(few.val.inputs, data.val.inputs)


def test_folder_comes_from_the_variable_or_the_cache(tmp_path, monkeypatch):
    write(tmp_path)
    monkeypatch.setenv("ARCHZOO_DATA", str(tmp_path))
    assert len(MNIST(val_size=10).train) == 30
    monkeypatch.delenv("ARCHZOO_DATA")
    (tmp_path / "cache").mkdir()
    write_to = tmp_path / "cache" / "archzoo"
    write_to.mkdir()
    write(write_to)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert len(MNIST(val_size=10).train) == 30


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_size": 0}, "val_size=0: must be a whole number from 1 to 39"),
        ({"val_size": 40}, "val_size=40: must be a whole number from 1 to 39"),
        ({"val_size": 10, "train_size": 31}, "train_size=31: must be a whole number from 1 to 30"),
        ({"val_size": 10, "train_size": 0}, "train_size=0"),
        ({"val_size": True}, "val_size=True"),
        ({"val_size": 2.5}, "val_size=2.5"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(tmp_path, options, message):
    write(tmp_path)
    with pytest.raises(ValueError, match=re.escape(message)):
        MNIST(data_dir=tmp_path, **options)


def flip(data: bytes) -> bytes:
    return data[:20] + bytes([data[20] ^ 1]) + data[21:]


@pytest.mark.parametrize("damage", [flip, lambda d: d[:-20], lambda d: b"", lambda d: d + b"x", lambda d: d[::-1]])
@pytest.mark.parametrize("name", FILES)
def test_damaged_file_is_named(tmp_path, damage, name):
    path = write(tmp_path) / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DatasetError, match=rf"{re.escape(str(path))} is cut short, corrupted .* delete it"):
        MNIST(data_dir=tmp_path, val_size=10)


@pytest.mark.parametrize("variable", [False, True])
def test_missing_folder_is_named_and_not_made(tmp_path, monkeypatch, variable):
    folder = tmp_path / "no such"
    if variable:
        monkeypatch.setenv("ARCHZOO_DATA", str(folder))
    with pytest.raises(DatasetError, match=rf"{'ARCHZOO_DATA' if variable else 'data_dir'}=.*no such.*no such folder"):
        MNIST(data_dir=None if variable else folder)
    assert not folder.exists()


def test_without_network_the_error_says_where_it_looked_and_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    began = time.monotonic()
    with pytest.raises(DatasetError) as raised:
        MNIST()
    assert time.monotonic() - began < 5
    message = str(raised.value)
    for part in ("MNIST", str(tmp_path / "archzoo" / "mnist" / FILES[0]), "ARCHZOO_DATA", "curl", "127.0.0.1:9"):
        assert part in message
    assert list(tmp_path.rglob("*")) == []


def test_without_a_home_folder_the_error_says_what_to_set(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(files.Path, "home", no_home)
    with pytest.raises(DatasetError, match="set ARCHZOO_DATA"):
        MNIST()


def test_absent_files_are_downloaded_once_and_whole(tmp_path, server):
    _, asked = server
    folder = write(tmp_path)
    kept = folder / FILES[1]
    for name in FILES:
        if name != kept.name:
            (folder / name).unlink()
    data = MNIST(data_dir=tmp_path, val_size=10)
    assert len(data.train) == 30
    assert sorted(asked) == sorted(f"/{name}" for name in FILES if name != kept.name)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == CONTENT  # and no temporary file
    MNIST(data_dir=tmp_path, val_size=10)
    assert len(asked) == 3


@pytest.mark.parametrize(
    ("answer", "message"),
    [(404, "404"), (b"<html>not here</html>", "wrong SHA-256"), (CONTENT[FILES[0]][:-9], "SHA-256")],
)
def test_wrong_download_is_never_kept(tmp_path, server, answer, message):
    server[0][FILES[0]] = answer
    with pytest.raises(DatasetError, match=message):
        MNIST(data_dir=tmp_path)
    assert list(tmp_path.rglob("*")) == []


def test_next_mirror_is_asked(tmp_path, server, monkeypatch):
    mirrors = ("http://127.0.0.1:9/", *mnist.SOURCE.mirrors)
    monkeypatch.setattr(mnist, "SOURCE", dataclasses.replace(mnist.SOURCE, mirrors=mirrors))
    assert len(MNIST(data_dir=tmp_path, val_size=10).train) == 30


def test_silent_server_is_given_up(tmp_path, server, monkeypatch):
    monkeypatch.setattr(files, "TIMEOUT", 0.3)
    server[0][FILES[0]] = "silence"
    began = time.monotonic()
    with pytest.raises(DatasetError, match="timed out"):
        MNIST(data_dir=tmp_path)
    assert time.monotonic() - began < 5


def test_endless_and_slow_downloads_are_given_up(tmp_path, server, monkeypatch):
    monkeypatch.setattr(files, "MAX_BYTES", 1000)
    with pytest.raises(DatasetError, match="more than 1000 bytes"):
        MNIST(data_dir=tmp_path)
    monkeypatch.setattr(files, "DEADLINE", 0.0)
    with pytest.raises(DatasetError, match="not done after 0 s"):
        MNIST(data_dir=tmp_path)


def test_folder_that_cannot_be_written_to_is_named(tmp_path, server):
    (tmp_path / "mnist").write_text("a file where the folder should be")
    with pytest.raises(DatasetError, match=re.escape(str(tmp_path / "mnist"))):
        MNIST(data_dir=tmp_path)


def test_failed_write_leaves_nothing_behind(tmp_path, server, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(DatasetError, match=r"cannot write .*No space left"):
        MNIST(data_dir=tmp_path)
    assert list((tmp_path / "mnist").iterdir()) == []


def test_idx_of_any_shape_is_read():
    for shape in [(3,), (2, 5), (2, 3, 4), (0, 4)]:
        array = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
        assert (parse_idx(idx(array)) == array).all()
        assert parse_idx(idx(array)).shape == shape


@pytest.mark.skipif(not DATA, reason="ARCHZOO_DATA names no data folder")
@pytest.mark.parametrize("task", sampled([MNIST, FashionMNIST], [MNIST]))
def test_real_data_are_standardised_and_complete(task):
    data = task(data_dir=DATA)
    assert (len(data.train), len(data.val), len(data.test)) == (55_000, 5_000, 10_000)
    inputs = torch.cat([data.train.inputs, data.val.inputs])
    assert abs(inputs.mean().item()) < 1e-3
    assert abs(inputs.std().item() - 1) < 1e-3
    assert data.test.targets.bincount().sum() == 10_000
    first = {MNIST: [5, 0, 4, 1, 9], FashionMNIST: [9, 0, 0, 3, 0]}[task]
    assert data.train.targets[:5].tolist() == first
