"""The callback `sample_text`: what a model writes is recorded, mirrored, and leaves training as it would be without."""

import functools
import html
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from archzoo.models.decoder import Decoder
from archzoo.names import visible
from archzoo.tasks import char_lm
from archzoo.tasks.char_lm import CharLM, python_corpus
from archzoo.training.build import build_task
from archzoo.training.config import ConfigError, asdict_plain, run_id
from archzoo.training.loop import Trainer
from archzoo.training.run import execute, load_model, make_callbacks
from archzoo.training.sample_text import SampleText
from tests.training.support import Blobs, lines_without_time, make_config
from tests.training.test_run import inspect

OPTIONS = {"prompt": "def ", "length": 12, "seed": 3}


@pytest.fixture(autouse=True)
def library(tmp_path, monkeypatch):
    """A small library stands in for Python's."""
    root = tmp_path / "lib"
    (root / "json").mkdir(parents=True)
    for i in range(40):
        (root / f"json/part{i}.py").write_text(f"def f{i}():\n    return {i}\n" * 8)
    monkeypatch.setattr(char_lm, "python_corpus", functools.partial(python_corpus, root))
    (tmp_path / "data").mkdir()
    monkeypatch.setenv("ARCHZOO_DATA", str(tmp_path / "data"))


def config(folder="unused", sample=OPTIONS, **changes):
    options = {
        "task": {"name": "char_lm", "context": 8},
        "model": {"name": "decoder", "width": 64, "depth": 1, "dropout": 0.2},
        "layer": {"name": "attention"},
        "callbacks": {} if sample is None else {"sample_text": sample},
    }
    return make_config(folder, **{**options, **changes})


def run_folder(c):
    return Path(c.output_dir) / run_id(asdict_plain(c))


def lines(c):
    return [json.loads(line) for line in (run_folder(c) / "samples.jsonl").read_text().splitlines()]


def end(c):
    """What a run has come to."""
    folder = run_folder(c)
    return lines_without_time(folder / "metrics.jsonl"), load_file(folder / "model.safetensors")


def same(a, b):
    return a[0] == b[0] and all(torch.equal(a[1][key], value) for key, value in b[1].items())


def interrupt(c, stop_at):
    looks = iter(range(1000))
    assert execute(c, should_stop=lambda: next(looks) == stop_at)["status"] == "interrupted"


def test_a_run_records_a_text_at_each_evaluation_and_that_of_the_scored_weights(tmp_path):
    c = config(tmp_path)
    record = execute(c)
    assert record["status"] == "done", record["error"]
    assert [line["step"] for line in lines(c)] == [4, 8, 12]
    for line in lines(c):
        assert line.keys() == {"step", "sample"}
        assert line["sample"].startswith("def ")
        assert len(line["sample"].encode(errors="replace")) > 4
    task, model = build_task(c), load_model(run_folder(c))
    prompt = task.encode("def ")[None]
    new = torch.stack(list(model.generate(prompt, 12, seed=3)), 1)
    assert record["summary"]["task"]["sample"] == task.decode(torch.cat([prompt, new], 1)[0])
    assert record["summary"]["task"]["corpus"] == "python"


def test_training_goes_on_as_it_would_without(tmp_path):
    with_, without = config(tmp_path / "with"), config(tmp_path / "without", sample=None)
    execute(with_), execute(without)
    assert same(end(with_), end(without))
    assert not (run_folder(without) / "samples.jsonl").exists()


class Drawing(Decoder):
    """Draws from the global state while it writes, and counts that."""

    drawn = 0

    def next_logits(self, ids, cache):
        Drawing.drawn += 1
        torch.rand(3)
        return super().next_logits(ids, cache)


def test_a_model_that_draws_random_numbers_does_not_disturb_training_either():
    c, ends = config(), []
    for made in ([], make_callbacks(c)):
        torch.manual_seed(0)
        trainer = Trainer(c, build_task(c), Drawing(256, 8, 1, dropout=0.2), made)
        trainer.fit()
        ends.append(trainer.model.state_dict())
    assert Drawing.drawn == 3 * 12
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


@pytest.mark.parametrize("stop_at", [2, 3, 9])  # between evaluations, at one, between later ones
def test_a_run_that_was_stopped_writes_and_ends_the_same(tmp_path, stop_at):
    whole, parts = (config(tmp_path / name, trainer={"ema_decay": 0.9}) for name in ("whole", "parts"))
    first = execute(whole)
    interrupt(parts, stop_at)
    record = execute(parts)
    assert same(end(parts), end(whole))
    assert lines(parts) == lines(whole)
    assert record["summary"] == first["summary"]


def test_what_was_written_after_the_checkpoint_is_dropped_and_so_is_a_line_that_was_cut_off(tmp_path):
    whole, parts = config(tmp_path / "whole"), config(tmp_path / "parts")
    execute(whole)
    interrupt(parts, 6)
    with (run_folder(parts) / "samples.jsonl").open("a") as file:
        file.write('{"step": 8, "sample": "of a process that was killed"}\n{"step": 12, "sam')
    execute(parts)
    assert lines(parts) == lines(whole)


def test_the_moving_average_writes_and_not_the_model_that_is_trained():
    c = config(sample={**OPTIONS, "temperature": 0}, trainer={"ema_decay": 0.5})
    torch.manual_seed(0)
    written = []
    trainer = Trainer(c, build_task(c), Decoder(256, 8, 1), make_callbacks(c), record_text=written.append)
    trainer.fit()
    prompt = trainer.task.encode("def ")
    new = list(trainer.ema.module.generate(prompt[None], 12, temperature=0))
    assert written[-1] == {"step": 12, "sample": trainer.task.decode(torch.cat([prompt, *new]))}
    assert trainer.model.training


def test_it_can_write_at_the_end_only(tmp_path):
    c = config(tmp_path, sample={**OPTIONS, "every_evaluation": False})
    assert execute(c)["summary"]["task"]["sample"].startswith("def ")
    assert not (run_folder(c) / "samples.jsonl").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"task": {"name": "digits"}, "model": {"name": "mlp", "width": 8}, "layer": {"name": "linear"}},
            "callbacks.sample_text: task digits has no text; choose task=char_lm or task=text",
        ),
        (
            {"model": {"name": "transformer", "width": 32, "depth": 1}, "layer": {"name": "linear"}},
            "callbacks.sample_text: model transformer cannot write text, for it has no generate(); choose "
            "model=decoder, or leave the callback out",
        ),
    ],
)
def test_what_cannot_write_is_refused_before_training(tmp_path, changes, message):
    c = config(tmp_path, **changes)
    record = execute(c)
    assert (record["status"], record["error"]) == ("failed", message)
    assert not (run_folder(c) / "metrics.jsonl").exists()


def test_a_prompt_of_other_characters_is_refused():
    task = CharLM(context=8)
    task.vocabulary = b"abc "
    trainer = Trainer(config(), task, Decoder(256, 8, 1))
    with pytest.raises(ConfigError, match=r"^callbacks\.sample_text\.prompt='abd': text='abd': byte b'd' at place 2"):
        SampleText("abd").check(trainer.config, trainer.task, trainer.model)
    with pytest.raises(ConfigError, match="has no text"):
        SampleText("abd").check(make_config(), Blobs(), torch.nn.Linear(2, 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": ""}, "prompt='': must be a text of one character at least"),
        ({"prompt": 3}, "prompt=3: must be a text"),
        ({"length": 0}, "length=0: must be a whole number from 1"),
        ({"temperature": -1}, "temperature=-1: must be from 0 to 100"),
        ({"temperature": "hot"}, "temperature='hot': must be a finite number"),
        ({"top_k": 0}, "top_k=0: must be a whole number, 1 or more"),
        ({"top_p": 0.0}, "top_p=0.0: must be above 0"),
        ({"top_p": "x"}, "top_p='x': must be a finite number"),
        ({"seed": None}, "seed=None: must be a whole number"),
        ({"every_evaluation": 3}, "every_evaluation=3: must be true or false"),
        ({"lenght": 3}, "did you mean 'length'"),
    ],
    ids=str,
)
def test_a_wrong_option_is_named(options, message):
    with pytest.raises(ConfigError) as error:
        make_callbacks(config(sample=options))
    assert message in str(error.value)
    assert str(error.value).startswith(f"callbacks.sample_text={options}: ")


def test_wandb_gets_every_text_escaped_also_after_an_interruption(tmp_path):
    c = config(tmp_path, sample={**OPTIONS, "prompt": "<b>\n"}, tracker={"wandb": "offline"})
    interrupt(c, 6)
    record = execute(c)
    records = [json.loads(line) for line in inspect(run_folder(c)).splitlines()]
    history = [r["history"]["item"] for r in records if r.get("type") == "history"]
    logged = {item["step"]: item["sample.path"] for item in history if "sample.path" in item}
    assert sorted(logged) == [line["step"] for line in lines(c)] == [4, 8, 12]
    (files,) = (run_folder(c) / "wandb").glob("offline-run-*/files")
    for line in lines(c):
        page = (files / logged[line["step"]]).read_text()
        assert page == f"<pre>{html.escape(visible(line['sample']))}</pre>"
        assert page.startswith("<pre>&lt;b&gt;\n")
    assert record["status"] == "done"
    assert "stopped recording" not in (run_folder(c) / "log.txt").read_text()


def test_tensorboard_gets_every_text(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    c = config(tmp_path, tracker={"tensorboard": True})
    interrupt(c, 6)
    execute(c)
    events = EventAccumulator(str(run_folder(c) / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    found = events.Tensors("sample/text_summary")
    assert [event.step for event in found] == [4, 8, 12]
    assert all(event.tensor_proto.string_val[0].decode().startswith("    def ") for event in found)
