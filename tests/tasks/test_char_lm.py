"""Bytes of Python's own sources or of Tiny Shakespeare: what the corpus is, where it lies, and what a window holds."""

import dataclasses
import functools
import hashlib
import logging
import math
import os
import platform
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from archzoo.tasks import char_lm, text
from archzoo.tasks.char_lm import CharLM, python_corpus
from archzoo.tasks.task import DatasetError, tasks
from archzoo.tasks.text import Text
from archzoo.training.config import asdict_plain, run_id
from archzoo.training.run import execute
from tests.training.support import lines_without_time, make_config

PLAY = "".join(f"Speaker {i}:\nTo be, or not to be.\n\n" for i in range(60))
SOURCES = {f"json/part{i}.py": f"def f{i}():\n    return {i}\n".encode() * (5 + i % 3) for i in range(60)}
DATA = os.environ.get("ARCHZOO_DATA")


def write(root, files):
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A small library stands in for Python's, and the data folder is empty."""
    root = write(tmp_path / "lib", SOURCES)
    monkeypatch.setattr(char_lm, "python_corpus", functools.partial(python_corpus, root))
    (tmp_path / "data").mkdir()
    monkeypatch.setenv("ARCHZOO_DATA", str(tmp_path / "data"))
    char_lm._say_once.cache_clear()
    return root


@pytest.fixture
def play(tmp_path, monkeypatch):
    """A short text stands in for the plays."""
    source = dataclasses.replace(text.SOURCE, sha256={text.FILE: hashlib.sha256(PLAY.encode()).hexdigest()})
    monkeypatch.setattr(text, "SOURCE", source)
    monkeypatch.setattr(char_lm, "SOURCE", source)
    monkeypatch.setenv("ARCHZOO_DATA", str(tmp_path))
    (tmp_path / text.FILE).write_text(PLAY)


def whole(split):
    """The bytes of windows that lie side by side."""
    inputs, targets = split.__getitems__(list(range(len(split))))
    return bytes(inputs.flatten().tolist()) + bytes([targets[-1, -1]])


def cached(tmp_path):
    (path,) = (tmp_path / "data" / char_lm.FOLDER).iterdir()
    return path


# ---- which bytes


def test_every_file_is_in_one_part_and_nearly_nine_tenths_are_for_training(library):
    data, (val, test) = python_corpus(library)
    parts = data[:val], data[val:test], data[test:]
    assert sum(map(len, parts)) == sum(map(len, SOURCES.values()))
    for source in SOURCES.values():
        assert [source in part for part in parts].count(True) == 1
    for end, part in ((val, 0.9), (test, 0.95)):
        assert part * len(data) <= end < part * len(data) + max(map(len, SOURCES.values()))
    assert data != b"".join(data for _, data in sorted(SOURCES.items())), "not in the order of the names"


def test_what_is_no_source_of_the_library_or_a_copy_is_left_out(library):
    before = python_corpus(library)
    write(
        library,
        {
            **{f"{folder}/json/x.py": b"x = 1\n" for folder in ("site-packages", "test", "json/__pycache__")},
            **{f"json/{folder}/x.py": b"x = 1\n" for folder in ("test", "tests", "idle_test", "dist-packages")},
            **dict.fromkeys(("_sysconfigdata__linux.py", "sitecustomize.py", "json/x.txt", "x/y.py"), b"x = 1\n"),
            "json/empty.py": b"",
        },
    )
    assert python_corpus(library) == before
    write(library, {"ast.py": b"x = 1\n", "json/copy.py": SOURCES["json/part7.py"]})
    data, _ = python_corpus(library)
    assert len(data) == len(before[0]) + len(b"x = 1\n")
    assert data.count(SOURCES["json/part7.py"]) == 1


def test_a_python_without_sources_is_refused(tmp_path):
    with pytest.raises(DatasetError, match=r"holds no sources of the standard library; use corpus=shakespeare"):
        python_corpus(tmp_path)


def test_the_running_pythons_library_is_found_whole():
    data, (val, test) = python_corpus()
    assert len(data) > 5e6
    for module in (logging, functools, dataclasses):
        assert data.count(Path(module.__file__).read_bytes()) == 1
    assert b"class TestProgram" in data, "unittest is no test"
    assert 0.9 <= val / len(data) < 0.93
    assert 0.95 <= test / len(data) < 0.98


def test_the_plays_are_those_of_task_text(play):
    ours, others = CharLM(corpus="shakespeare", context=10, stride=3), Text(context=10, stride=3)
    assert ours.vocabulary.decode() == others.characters
    assert ours.output_size == others.output_size
    for name in ("train", "val", "test"):
        mine, its = getattr(ours, name), getattr(others, name)
        assert len(mine) == len(its)
        for a, b in zip(mine.__getitems__(list(range(len(mine)))), (its.inputs, its.targets), strict=True):
            assert torch.equal(a, b)


@pytest.mark.skipif(not DATA, reason="ARCHZOO_DATA names no data folder")
def test_the_true_plays_have_the_known_numbers():
    task = tasks.create("char_lm", corpus="shakespeare")
    assert task.output_size == 65
    assert task.sizes == [1_003_854, 55_770, 55_770]
    assert task.sha256 == text.SOURCE.sha256[text.FILE]


# ---- where they lie


def test_the_corpus_is_written_once_and_mapped(library, tmp_path, monkeypatch):
    first = CharLM(context=8)
    path = cached(tmp_path)
    assert path.read_bytes() == python_corpus(library)[0]
    assert path.name.startswith(f"python-{platform.python_version()}-{first.sha256[:16]}")
    monkeypatch.setattr(char_lm, "write_whole", lambda *args: pytest.fail("written again"))
    again = CharLM(context=8)
    assert whole(again.train) == whole(first.train)
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(path) in maps.read_text()


def test_another_library_is_another_file(library, tmp_path):
    CharLM(context=8)
    write(library, {"ast.py": b"x = 1\n"})
    CharLM(context=8)
    assert len(list((tmp_path / "data" / char_lm.FOLDER).iterdir())) == 2


def test_a_damaged_file_is_written_again(library, tmp_path, logs):
    whole_text = whole(CharLM(context=8).train)
    path = cached(tmp_path)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert whole(CharLM(context=8).train) == whole_text
    assert path.read_bytes() == python_corpus(library)[0]
    assert "is cut short or corrupted; it is written again" in logs.text


@pytest.mark.parametrize("how", ["marked", "full"])
def test_where_it_cannot_be_written_it_stays_in_memory_and_that_is_said_once(library, tmp_path, monkeypatch, logs, how):
    expected = whole(CharLM(context=8).train)
    cached(tmp_path).unlink()
    (tmp_path / "data" / char_lm.FOLDER).rmdir()
    if how == "marked":
        (tmp_path / "data").chmod(0o555)
    else:

        def full(*args):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(char_lm, "write_whole", full)
    tasks_ = [CharLM(context=8) for _ in range(2)]
    (tmp_path / "data").chmod(0o755)
    assert all(whole(task.train) == expected for task in tasks_)
    assert not list((tmp_path / "data").iterdir())
    assert [record.levelname for record in logs.records] == ["WARNING"]
    assert "the corpus is held in memory. Set ARCHZOO_DATA to a folder that can be written to" in logs.text


def test_a_data_folder_that_is_not_there_is_named(library, monkeypatch):
    monkeypatch.setenv("ARCHZOO_DATA", "/no/such/folder")
    with pytest.raises(DatasetError, match="there is no such folder"):
        CharLM(context=8)


# ---- windows


def test_windows_lie_side_by_side_and_targets_one_place_further(library):
    task = CharLM(context=10)
    data, ends = python_corpus(library)
    for split, begin, end in zip((task.train, task.val, task.test), [0, *ends], [*ends, len(data)], strict=True):
        inputs, targets = split.__getitems__(list(range(len(split))))
        assert (inputs.dtype, targets.dtype, inputs.shape[1:]) == (torch.int64, torch.int64, (10,))
        assert bytes(inputs.flatten().tolist()) == data[begin : begin + inputs.numel()]
        assert bytes(targets.flatten().tolist()) == data[begin + 1 : begin + 1 + inputs.numel()]
        assert end - begin - inputs.numel() <= 10
    assert (task.input_shape, task.output_size, task.vocabulary) == ((10,), 256, bytes(range(256)))


def test_a_window_is_the_same_however_it_is_asked_for(library):
    split = CharLM(context=7, stride=1).train
    data, ends = python_corpus(library)
    assert len(split) == ends[0] - 7
    indices = [len(split) - 1, 3, 100]
    inputs, targets = split.__getitems__(torch.tensor(indices))
    loaded = next(iter(DataLoader(split, batch_sampler=[indices], num_workers=1, collate_fn=CharLM.collate)))
    for place, index in enumerate(indices):
        assert bytes(inputs[place].tolist()) == data[index : index + 7]
        assert torch.equal(split[index][0], inputs[place])
        assert torch.equal(split[index][1], targets[place])
    assert torch.equal(loaded[0], inputs)
    assert torch.equal(loaded[1], targets)


def test_fewer_bytes_are_the_beginnings_of_the_parts(library):
    full, capped = CharLM(context=4), CharLM(context=4, max_bytes=1000)
    assert 997 < sum(capped.sizes) <= 1000
    for name in ("train", "val", "test"):
        assert whole(getattr(full, name)).startswith(whole(getattr(capped, name)))
    assert capped.sha256 == full.sha256
    assert CharLM(context=4, max_bytes=10**9).sizes == full.sizes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"corpus": "pyton"}, "corpus='pyton': there is no such corpus; did you mean 'python'"),
        ({"context": 0}, "context=0: must be a whole number from 1 to 16384"),
        ({"stride": 0}, "stride=0: must be a whole number from 1 to 16384"),
        ({"max_bytes": 0}, "max_bytes=0: must be a whole number from 1 to "),
        ({"max_bytes": 1e6}, "max_bytes=1000000.0: must be a whole number"),
        ({"max_bytes": 500}, "context=128, max_bytes=500: a window of 129 bytes does not fit into parts of 4"),
    ],
    ids=str,
)
def test_a_wrong_option_is_named(library, options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        CharLM(**options)


# ---- loss, metrics, text


def test_the_score_is_the_loss_in_bits(library):
    task = CharLM(context=8)
    _, targets = task.train.__getitems__(list(range(20)))
    output = torch.randn(20, 8, 256)
    loss = -output.log_softmax(-1).gather(-1, targets[..., None]).mean()
    metrics = task.metrics()
    metrics.update(output[:17], targets[:17])
    metrics.update(output[17:], targets[17:])
    values = metrics.compute()
    assert values.keys() == {"accuracy", "bits_per_byte", "loss"}
    torch.testing.assert_close(values["loss"].float(), loss)
    torch.testing.assert_close(values[task.score].float(), loss / math.log(2))
    assert values["accuracy"].item() == pytest.approx((output.argmax(-1) == targets).float().mean().item())
    assert task.mode == "min"


def test_text_becomes_ids_and_text_again(library, play):
    bytewise, plays, characters = CharLM(context=8), CharLM(corpus="shakespeare", context=8), Text(context=8)
    for task in (bytewise, plays, characters):
        ids = task.encode("To be:\n")
        assert ids.dtype == torch.int64
        assert task.decode(ids) == "To be:\n"
        assert torch.equal(task.encode(b"To be:\n"), ids)
        assert task.decode(task.encode("")) == ""
        assert task.decode(task.train[0][0]) == bytes(task.vocabulary[i] for i in task.train[0][0]).decode()
    assert bytewise.encode("é漢").tolist() == list("é漢".encode())
    assert bytewise.decode(bytewise.encode("é漢")) == "é漢"
    assert bytewise.decode(torch.tensor([97, 0xFF, 98, 0xC3])) == "a\ufffdb\ufffd"


def test_what_is_no_text_of_the_corpus_is_refused(library, play):
    task = CharLM(corpus="shakespeare", context=8)
    with pytest.raises(ValueError, match=r"^text='To ~be': byte b'~' at place 3 does not occur in the corpus"):
        task.encode("To ~be")
    with pytest.raises(ValueError, match=r"^ids from 0 to 99: must be 0 to \d+$"):
        task.decode(torch.tensor([0, 99]))
    with pytest.raises(ValueError, match=r"^ids from -1 to 3: must be 0 to"):
        task.decode(torch.tensor([3, -1]))
    for ids in (torch.zeros(1, 2, dtype=torch.int64), torch.zeros(2)):
        with pytest.raises(ValueError, match=r"^ids of shape .*: must be whole numbers \(length,\)$"):
            task.decode(ids)


# ---- a run


def config(folder, **trainer):
    return make_config(
        folder,
        task={"name": "char_lm", "context": 8, "stride": 1},
        model={"name": "transformer", "width": 32, "depth": 1, "dropout": 0.2},
        trainer={"ema_decay": 0.9, **trainer},
    )


@pytest.mark.parametrize(("stop_at", "workers"), [(0, 0), (5, 0), (9, 1)])
def test_a_run_that_was_stopped_reads_on_and_ends_the_same(library, tmp_path, stop_at, workers):
    """At the first step, at an evaluation, between two; read by the process itself and by another."""
    before, parts = config(tmp_path / "whole"), config(tmp_path / "parts", workers=workers)
    first = execute(before)
    looks = iter(range(1000))
    assert execute(parts, should_stop=lambda: next(looks) == stop_at)["status"] == "interrupted"
    record = execute(parts)
    assert record["status"] == first["status"] == "done", record["error"]
    folders = [Path(c.output_dir) / run_id(asdict_plain(c)) for c in (before, parts)]
    lines = [lines_without_time(folder / "metrics.jsonl") for folder in folders]
    assert lines[0] == lines[1]
    assert len([line for line in lines[0] if "val/bits_per_byte" in line]) == 3
    a, b = (load_file(folder / "model.safetensors") for folder in folders)
    assert all(torch.equal(a[key], b[key]) for key in b)
    assert record["score"] == first["score"]


def test_a_record_says_which_bytes_they_were(library, tmp_path):
    record = execute(config(tmp_path / "out", steps=1))
    task = CharLM(context=8)
    assert record["summary"]["task"] == {
        "corpus": "python",
        "corpus_sha256": hashlib.sha256(python_corpus(library)[0]).hexdigest(),
        "corpus_bytes": task.sizes,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
    }
    assert sum(task.sizes) == len(python_corpus(library)[0])


def test_a_record_of_the_plays_names_no_python(play):
    task = CharLM(corpus="shakespeare", context=8)
    sha256 = hashlib.sha256(PLAY.encode()).hexdigest()
    told = {"corpus": "shakespeare", "corpus_sha256": sha256, "corpus_bytes": task.sizes}
    assert task.summarize([], torch.nn.Identity()) == told
    assert sum(task.sizes) == len(PLAY)
