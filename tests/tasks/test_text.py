"""Tiny Shakespeare: the file is found, verified and split; windows, loss and metrics are what they say."""

import dataclasses
import hashlib
import http.server
import math
import os
import threading

import pytest
import torch

from archzoo.tasks import text
from archzoo.tasks.task import DatasetError, tasks
from archzoo.tasks.text import Text
from archzoo.training import cli
from tests.helpers import sampled

DATA = os.environ.get("ARCHZOO_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="ARCHZOO_DATA names no data folder")
PLAY = "".join(f"Speaker {i}:\nTo be, or not to be.\n\n" for i in range(60))


@pytest.fixture(autouse=True)
def short_play(monkeypatch, tmp_path, request):
    """A short text stands in for the plays, no mirror answers, and the data folder is empty; real tests excepted."""
    if "real" in request.node.name:
        return
    sha256 = {text.FILE: hashlib.sha256(PLAY.encode()).hexdigest()}
    monkeypatch.setattr(
        text, "SOURCE", dataclasses.replace(text.SOURCE, sha256=sha256, mirrors=("http://127.0.0.1:9/",))
    )
    monkeypatch.setenv("ARCHZOO_DATA", str(tmp_path))
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def play(tmp_path):
    (tmp_path / text.FILE).write_text(PLAY)
    return tmp_path


def as_text(task, numbers):
    return "".join(task.characters[i] for i in numbers.tolist())


def test_windows_lie_side_by_side_and_targets_one_place_further(play):
    task = Text(context=10)
    inputs, targets = task.train.__getitems__(list(range(len(task.train))))
    assert (inputs.dtype, inputs.shape[1:], task.input_shape) == (torch.int64, (10,), (10,))
    assert as_text(task, inputs.flatten()) == PLAY[: inputs.numel()]
    assert as_text(task, targets.flatten()) == PLAY[1 : inputs.numel() + 1]
    assert len(PLAY) * 0.9 - inputs.numel() < 11
    x, y = task.train[3]
    assert torch.equal(x, inputs[3])
    assert torch.equal(y, targets[3])
    assert task.characters == "".join(sorted(set(PLAY)))
    assert task.output_size == len(task.characters)


def test_parts_are_ninety_five_and_five_percent_and_do_not_overlap(play):
    task = Text(context=1)
    parts = [
        as_text(task, split.__getitems__(list(range(len(split))))[0].flatten())
        for split in (task.train, task.val, task.test)
    ]
    ends = [len(PLAY) * 90 // 100, len(PLAY) * 95 // 100, len(PLAY)]
    starts = [0, *ends]
    for part, start, end in zip(parts, starts, ends, strict=False):
        assert part == PLAY[start : end - 1]


def test_with_stride_1_every_place_starts_a_window_and_takes_no_memory(play):
    task = Text(context=10, stride=1)
    assert len(task.train) == len(PLAY) * 90 // 100 - 10
    assert as_text(task, task.train[7][0]) == PLAY[7:17]
    assert task.train.inputs.untyped_storage().nbytes() == 8 * len(PLAY)
    assert len(task.val) == len(Text(context=10).val)


def test_seed_changes_no_split(play):
    first, other = Text(seed=0), Text(seed=1)
    for split in ("train", "val", "test"):
        assert torch.equal(getattr(first, split).inputs, getattr(other, split).inputs)


def test_loss_and_metrics_are_means_over_characters_whatever_the_batches(play):
    task = Text(context=8)
    _, targets = task.train.__getitems__(list(range(20)))
    output = torch.randn(20, 8, task.output_size)
    chances = output.softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
    loss = -chances.log().mean()
    torch.testing.assert_close(task.loss(output, targets), loss)
    metrics = task.metrics()
    metrics.update(output[:17], targets[:17])
    metrics.update(output[17:], targets[17:])
    values = metrics.compute()
    torch.testing.assert_close(values["loss"].float(), loss)
    torch.testing.assert_close(values["bits_per_character"].float(), loss / math.log(2))
    assert values["accuracy"].item() == pytest.approx((output.argmax(-1) == targets).float().mean().item())
    assert task.score in values
    assert task.mode == "min"
    knowing = torch.nn.functional.one_hot(targets, task.output_size) * 100.0
    sure = task.metrics()
    sure.update(knowing, targets)
    assert sure.compute()["accuracy"] == 1
    assert sure.compute()["bits_per_character"] < 1e-6


@pytest.mark.parametrize("options", [{"context": 0}, {"context": 2.5}, {"stride": 0}, {"context": 2**15}], ids=str)
def test_a_wrong_option_is_named(play, options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"^{name}={value}: must be a whole number from 1 to 16384"):
        Text(**options)


def test_a_file_that_is_another_is_refused(play):
    (play / text.FILE).write_text(PLAY + "!")
    with pytest.raises(DatasetError, match=r"Tiny Shakespeare: .* is cut short, corrupted or another file"):
        Text()


def test_an_absent_file_is_downloaded_under_its_own_name(monkeypatch, tmp_path):
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(PLAY.encode())

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    mirror = f"http://127.0.0.1:{server.server_port}/data/input.txt#"
    monkeypatch.setattr(text, "SOURCE", dataclasses.replace(text.SOURCE, mirrors=(mirror,)))
    try:
        Text()
    finally:
        server.shutdown()
        server.server_close()
    assert asked == ["/data/input.txt"]
    assert (tmp_path / text.FILE).read_text() == PLAY
    monkeypatch.setattr(text, "SOURCE", dataclasses.replace(text.SOURCE, mirrors=()))
    Text()


def test_an_absent_file_without_a_network_says_how_to_get_it():
    with pytest.raises(DatasetError, match=r"tinyshakespeare\.txt, and it could not be downloaded"):
        Text()


@pytest.mark.parametrize("match", sampled(["params", "flops"], ["flops"]))
def test_a_run_counts_and_trains_on_integers(play, tmp_path, match):
    """Budget, cost record and loop take tokens: zeros of floating point would be refused by an embedding."""
    arguments = ["task=text", "task.context=16", "model=transformer", "model.width=32", "layer=phm", "layer.n=2"]
    arguments += [f"budget.match={match}", "budget.to=linear", "budget.unreachable=nearest", "tracker=none"]
    arguments += ["trainer.steps=3", "trainer.epochs=null", "trainer.batch_size=8", f"output_dir={tmp_path / 'out'}"]
    assert cli.main(arguments) == 0
    assert len(list((tmp_path / "out").glob("*/run.json"))) == 1


def test_a_model_of_real_numbers_is_refused_and_one_of_tokens_for_other_tasks(play, tmp_path, capsys):
    for words, message in (
        (
            ["task=text", "model=mlp"],
            "model=mlp: takes real numbers, and the inputs of task text are tokens; set model=",
        ),
        (
            ["task=digits", "model=transformer"],
            "model=transformer: takes tokens, and the inputs of task digits are real",
        ),
    ):
        assert cli.main([*words, f"output_dir={tmp_path / 'out'}", "tracker=none"]) != 0
        assert f" {message}" in " " + capsys.readouterr().err.replace("\n", " ")
    assert not list((tmp_path / "out").glob("*/run.json"))


@needs_data
def test_real_text_has_the_known_numbers():
    task = tasks.create("text")
    assert task.output_size == 65
    assert task.characters.startswith("\n !$&',-.3:;?ABC")
    sizes = [len(split) for split in (task.train, task.val, task.test)]
    assert sizes == [(1_003_854 - 1) // 64, (55_770 - 1) // 64, (55_770 - 1) // 64]
    assert as_text(task, task.train[0][0]).startswith("First Citizen:\nBefore we proceed")
