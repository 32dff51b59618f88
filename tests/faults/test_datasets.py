"""Data sets that are missing, partial, corrupted or evil: a DatasetError that helps, and nothing outside the folder."""

import hashlib
import http.server
import multiprocessing
import os
import random
import signal
import tempfile
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image

from archzoo.tasks import chess_moves, cifar10, files, mnist, super_resolution
from archzoo.tasks.chess_bench import STATE_VALUE, Bag, BagPositions, read_puzzles
from archzoo.tasks.idx import FILES
from archzoo.tasks.task import DatasetError
from benchmarks._broken_data import PLAIN, READERS, below, damages, evil_tar, evil_zip, flipped, refusals, small_sets
from tests.tasks.test_chess_bench import START, positions, state, write_bag, write_puzzles


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: f"{reader[0]}-{reader[3]}")
def test_each_task_names_a_broken_file_and_what_gets_it(tmp_path, reader):
    with small_sets() as contents:
        for refusal in refusals(tmp_path, contents, reader):
            assert refusal.helps, f"{refusal.kind}: {refusal.error!r}"
            if refusal.kind == "missing":
                for part in ("it could not be downloaded", "Connection refused", files.VARIABLE):
                    assert part in str(refusal.error)
            assert not refusal.changed, refusal.kind
            assert refusal.seconds < 5, refusal.kind


@contextmanager
def as_nobody():
    """Root may read and write everything, and so is somebody else in here."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_a_file_that_may_not_be_read_and_a_folder_that_may_not_be_written_are_named(tmp_path, server):
    for folder in (tmp_path, *(p for p in tmp_path.parents if p.is_relative_to(tempfile.gettempdir()))):
        folder.chmod(folder.stat().st_mode | 0o055)
    path = tmp_path / mnist.SOURCE.folder / FILES[0]
    path.parent.mkdir()
    path.write_bytes(PLAIN)
    path.chmod(0)
    with as_nobody(), pytest.raises(DatasetError, match=rf"cannot read {path}: .*Permission denied.*curl"):
        files.read_file(mnist.SOURCE, FILES[0], tmp_path)
    source, answers, _ = server
    answers["a.bin"] = PLAIN
    with as_nobody(), pytest.raises(DatasetError, match=r"cannot write .*Permission denied.*set ARCHZOO_DATA"):
        files.read_file(source, "a.bin", tmp_path)
    assert not (tmp_path / source.folder).exists()


@pytest.mark.parametrize(
    ("reader", "evil"),
    [
        (cifar10._official, evil_tar({"../evil.bin": b"x", "/a/../evil.bin": b"y"}, {})),
        (cifar10._official, evil_tar({"link/evil.bin": b"x"}, {"link": "..", "data_batch_1.bin": "/etc/passwd"})),
        (cifar10._unpack, evil_zip({"../sheets.npy": b"x", "/sheets.npy": b"y"})),
        (cifar10._unpack, evil_zip({"labels.npy": b"x"})),
    ],
    ids=["climbs", "link", "zip", "keys"],
)
def test_an_archive_is_read_in_memory_and_never_extracted(tmp_path, monkeypatch, reader, evil):
    """Even if its SHA-256 were right."""
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    with pytest.raises((ValueError, KeyError)):
        reader(evil)
    assert list(below(tmp_path)) == [tmp_path / "a", inner]


# ---- downloads


@pytest.fixture
def server(monkeypatch):
    """A source whose mirror sends `answers[name]`: bytes, a status, or what is called with the handler."""
    answers, asked = {}, []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            answer = answers[self.path.strip("/")]
            if callable(answer):
                answer(self)
            elif isinstance(answer, int):
                self.send_error(answer)
            else:
                begin(self, len(answer))
                self.wfile.write(answer)

        def log_message(self, *args):
            pass

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
        threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        sha256 = {name: hashlib.sha256(PLAIN).hexdigest() for name in ("a.bin", "b.bin")}
        yield files.Source("A set", "set", (f"http://127.0.0.1:{made.server_address[1]}/",), sha256), answers, asked
        made.shutdown()


def begin(handler, length):
    handler.send_response(200)
    handler.send_header("Content-Length", str(length))
    handler.end_headers()


def partial(handler):
    """Ends in the middle, though it promised more."""
    begin(handler, len(PLAIN))
    handler.wfile.write(PLAIN[: len(PLAIN) // 2])


def endless_detour(handler):
    handler.send_response(302)
    handler.send_header("Location", handler.path)
    handler.end_headers()


def local_detour(handler):
    handler.send_response(302)
    handler.send_header("Location", "file:///etc/passwd")
    handler.end_headers()


@pytest.mark.parametrize(
    ("answer", "times"),
    [
        (partial, 1),
        (PLAIN[:-1], 1),
        (b"", 1),
        (evil_tar({"../evil": b"x"}, {}), 1),
        (503, 1),
        (local_detour, 1),
        (endless_detour, 10),
        (lambda handler: handler.wfile.write(b"no HTTP at all"), 1),
        (lambda handler: handler.connection.close(), 1),
    ],
    ids=["cut", "short", "empty", "evil", "busy", "file", "detour", "noise", "closed"],
)
def test_what_is_not_the_file_is_never_kept_and_never_asked_for_again(tmp_path, server, answer, times):
    source, answers, asked = server
    answers["a.bin"] = answer
    with pytest.raises(DatasetError, match=r"A set: there is no .*a\.bin, and it could not be downloaded") as raised:
        files.read_file(source, "a.bin", tmp_path)
    assert f"curl --location --create-dirs --output {tmp_path}/set/a.bin {source.mirrors[0]}a.bin" in str(raised.value)
    assert below(tmp_path) == {}
    assert 1 <= len(asked) <= times


def slowly(handler):
    begin(handler, len(PLAIN))
    for start in range(0, len(PLAIN), 999):
        handler.wfile.write(PLAIN[start : start + 999])
        time.sleep(0.005)


def _get(source, folder):
    os._exit(0 if files.read_file(source, "a.bin", folder) == PLAIN else 1)


def test_four_processes_that_download_at_once_all_get_the_whole_file(tmp_path, server):
    source, answers, asked = server
    answers["a.bin"] = slowly
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_get, args=(source, tmp_path)) for _ in range(4)]
    for process in processes:
        process.start()
    seen = set()
    while any(process.is_alive() for process in processes):
        if (path := tmp_path / "set" / "a.bin").exists():
            seen.add(path.read_bytes() == PLAIN)
        time.sleep(0.002)
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert seen <= {True}
    assert [path.name for path in (tmp_path / "set").iterdir()] == ["a.bin"]
    assert len(asked) == 4


@pytest.mark.slow
def test_a_download_that_is_killed_at_any_moment_leaves_no_file_or_the_whole_one(tmp_path, server):
    source, answers, _ = server
    answers["a.bin"] = slowly
    rng, whole = random.Random(20240430), 0
    context = multiprocessing.get_context("fork")
    for trial in range(50):
        folder = tmp_path / str(trial)
        folder.mkdir()
        process = context.Process(target=_get, args=(source, folder))
        process.start()
        time.sleep(rng.uniform(0.0, 0.06))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        if (path := folder / "set" / "a.bin").exists():
            whole += 1
            assert path.read_bytes() == PLAIN
        assert files.read_file(source, "a.bin", folder) == PLAIN
    assert 0 < whole < 50, "moments before and after the end"


# ---- what is nobody's but the user's: no checksum is known


def chess_files(folder):
    """A bag of values and a list of puzzles."""
    bag = write_bag(folder / "state_value_data.bag", [state(fen, 0.25) for fen in positions(20)])
    rows = [{"FEN": START, "Moves": "e2e4 e7e5 g1f3", "Rating": "1500"}, {"PGN": "1. e4 e5", "Moves": "g1f3 b8c6"}]
    rows = [{"FEN": "", "PGN": "", "Rating": "900"} | row for row in rows]
    return bag, write_puzzles(folder / "puzzles.csv", rows)


def read_bag(path):
    bag = Bag(path)
    BagPositions(STATE_VALUE, [bag], 0, len(bag)).__getitems__(range(len(bag)))


def read_or_refuse(reader, path):
    """Whether it could be read; anything but a DatasetError that names the path is raised."""
    try:
        reader(path)
    except DatasetError as error:
        assert str(path) in str(error)
        return False
    return True


@pytest.mark.parametrize("flips", [40, pytest.param(2000, marks=pytest.mark.slow)])
def test_broken_files_of_chess_are_named(tmp_path, flips):
    pytest.importorskip("chess", reason="python-chess is not installed: pip install 'archzoo[chess]'")
    rng = random.Random(flips)
    for path, reader in zip(chess_files(tmp_path), (read_bag, lambda path: read_puzzles(path, 9)), strict=True):
        good = path.read_bytes()
        assert read_or_refuse(reader, path)
        for kind, damage in damages(good, b"another file").items():
            if kind in ("flipped", "huge", "longer", "truncated", "endless"):  # for the flips below; or no fault of it
                continue
            path.unlink()
            damage(path)
            assert not read_or_refuse(reader, path), kind
            path.rmdir() if path.is_dir() else path.unlink()
            path.touch()
        for _ in range(flips):  # without a checksum some are other positions
            path.write_bytes(flipped(good, rng.randrange(len(good)), rng.randrange(8)))
            read_or_refuse(reader, path)
        path.unlink()
        assert not read_or_refuse(reader, path)


@pytest.mark.parametrize("flips", [100, pytest.param(3000, marks=pytest.mark.slow)])
def test_a_broken_picture_is_named_and_no_other_is_read_for_it(tmp_path, flips):
    rng = random.Random(flips)
    path = tmp_path / "b.png"
    pixels = np.random.RandomState(0).randint(0, 256, (40, 40, 3)).astype(np.uint8) // 64 * 64
    Image.fromarray(pixels).save(path)
    good = path.read_bytes()
    read = []

    def reader(path):
        ((_, high),) = super_resolution._read([path], 2)
        read.append(np.array_equal(high[0].permute(1, 2, 0).numpy(), pixels))

    assert read_or_refuse(reader, path)
    for kind, damage in damages(good, b"another file").items():
        if kind not in ("huge", "longer", "truncated"):  # what is behind the last pixel does not matter
            path.unlink()
            damage(path)
            assert not read_or_refuse(reader, path), kind
            path.rmdir() if path.is_dir() else path.unlink()
            path.touch()
    for _ in range(flips):
        path.write_bytes(flipped(good, rng.randrange(len(good)), rng.randrange(8)))
        read_or_refuse(reader, path)
    assert all(read), "the checksums of a PNG file are looked at"
    assert len(read) < flips / 10


def test_the_embedded_positions_are_named_where_they_are_broken(tmp_path, monkeypatch):
    good = chess_moves.EMBEDDED.read_bytes()
    path = tmp_path / "chess_positions.npz"
    monkeypatch.setattr(chess_moves, "EMBEDDED", path)
    for kind, damage in {**damages(good, evil_zip({"packed.npy": b""})), "missing": lambda path: None}.items():
        damage(path)
        with pytest.raises(DatasetError, match=rf"{path}.*pip install --force-reinstall archzoo"):
            chess_moves.embedded_positions()
        assert kind == "missing" or path.is_symlink() or path.exists()
        path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
