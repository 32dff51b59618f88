"""Tasks of made-up token sequences: samples are what the papers say, streams are pure functions, figures are told."""

import itertools
import pickle
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from archzoo.models.decoder import Decoder
from archzoo.models.generation import CausalLM
from archzoo.models.model import LayerFactory, models
from archzoo.tasks import induction_heads
from archzoo.tasks.associative_recall import AssociativeRecall
from archzoo.tasks.induction_heads import InductionHeads
from archzoo.tasks.selective_copying import SelectiveCopying
from archzoo.tasks.stream import STREAM_LENGTH
from archzoo.tasks.token_stream import UNASKED, draw_distinct
from archzoo.training.run import execute
from tests.training.support import lines_without_time, make_config

TASKS = {
    "selective_copying": SelectiveCopying,
    "induction_heads": InductionHeads,
    "associative_recall": AssociativeRecall,
}
every_task = pytest.mark.parametrize("name", TASKS)


def build(name, **options):
    return TASKS[name](**{"eval_size": 40, **options})


# --- What the samples are: a slow check of each sequence that knows nothing of how it was drawn -----------------------


def check_selective_copying(ids, targets, *, length, data, symbols):
    assert len(ids) == length + data
    seen = [token for token in ids[:length] if token != 0]
    assert len(seen) == data
    assert all(1 <= token <= symbols for token in seen)
    assert ids[length:] == [symbols + 1] * data
    assert targets == [UNASKED] * length + seen


def check_induction_heads(ids, targets, *, length, symbols):
    assert len(ids) == length
    first, second = (i for i, token in enumerate(ids) if token == 0)
    assert second == length - 1
    assert all(1 <= token <= symbols for token in ids if token)
    assert targets == [UNASKED] * (length - 1) + [ids[first + 1]]
    assert ids[first + 1] != 0


def check_associative_recall(ids, targets, *, length, pairs, vocab, queries=None, power=0.01):
    assert len(ids) == length
    keys, values = ids[0 : 2 * pairs : 2], ids[1 : 2 * pairs : 2]
    assert len(set(keys)) == len(set(values)) == pairs
    assert all(1 <= key < vocab // 2 for key in keys)
    assert all(vocab // 2 <= value < vocab for value in values)
    value_of, asked = dict(zip(keys, values, strict=True)), []
    for place, (token, target) in enumerate(zip(ids, targets, strict=True)):
        if place < 2 * pairs or token == 0:
            assert target == UNASKED
        else:
            asked.append(token)
            assert place % 2 == 0
            assert target == value_of[token]
    assert len(asked) == len(set(asked)) == (pairs if queries is None else queries)


CHECKS = {
    "selective_copying": check_selective_copying,
    "induction_heads": check_induction_heads,
    "associative_recall": check_associative_recall,
}
SMALL = {
    "selective_copying": {"length": 16, "data": 3, "symbols": 6},
    "induction_heads": {"length": 32, "symbols": 8},
    "associative_recall": {"length": 16, "pairs": 4, "vocab": 32},
}
PAPER = {
    "selective_copying": {"length": 4096, "data": 16, "symbols": 14},
    "induction_heads": {"length": 256, "symbols": 15},
    "associative_recall": {"length": 512, "pairs": 64, "vocab": 8192},
}
VOCABULARY = {"selective_copying": 16, "induction_heads": 16, "associative_recall": 8192}


def check(name, split, count, options):
    inputs, targets = split.__getitems__(list(range(count)))
    assert (inputs.dtype, targets.dtype) == (torch.int64, torch.int64)
    for ids, answers in zip(inputs.tolist(), targets.tolist(), strict=True):
        CHECKS[name](ids, answers, **options)


@every_task
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_samples_are_what_the_task_says_and_the_defaults_small(name, split):
    task = build(name)
    check(name, getattr(task, split), 40, SMALL[name])
    assert task.input_shape == getattr(task, split)[0][0].shape


@every_task
def test_samples_of_the_papers_size(name):
    task = build(name, **PAPER[name], eval_size=4)
    check(name, task.train, 20, PAPER[name])
    assert task.output_size == VOCABULARY[name]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_samples_of_any_size(data):
    name = data.draw(st.sampled_from(sorted(TASKS)))
    if name == "selective_copying":
        length = data.draw(st.integers(1, 40))
        options = {"length": length, "data": data.draw(st.integers(1, length)), "symbols": data.draw(st.integers(1, 9))}
    elif name == "induction_heads":
        options = {"length": data.draw(st.integers(3, 40)), "symbols": data.draw(st.integers(1, 9))}
    else:
        pairs = data.draw(st.integers(1, 8))
        queries = data.draw(st.none() | st.integers(1, pairs))
        least = 2 * pairs + 2 * (queries or pairs)
        options = {
            "length": data.draw(st.integers(least, least + 9)),
            "pairs": pairs,
            "queries": queries,
            "vocab": data.draw(st.integers(2 * pairs + 2, 40)),
            "power": data.draw(st.floats(0, 2)),
        }
    task = build(name, **options, seed=data.draw(st.integers(0, 2**40)), eval_size=5)
    check(name, task.train, 20, options)
    check(name, task.val, 5, options)
    assert int(task.train.__getitems__(range(20))[0].max()) < task.output_size


def test_everything_that_can_be_drawn_is_drawn_and_about_as_often():
    """Chi-squared, each below its 99.99 % quantile."""
    inputs, targets = build("selective_copying", length=4, data=2, symbols=3).train.__getitems__(range(6000))
    places = [tuple(np.flatnonzero(row)) for row in inputs[:, :4].numpy()]
    expect_even(places, list(itertools.combinations(range(4), 2)))
    expect_even([tuple(row) for row in targets[:, 4:].tolist()], list(itertools.product((1, 2, 3), repeat=2)))
    inputs, targets = build("induction_heads", length=7, symbols=3).train.__getitems__(range(6000))
    expect_even(inputs.argmin(1).tolist(), list(range(5)))
    expect_even(targets[:, -1].tolist(), [1, 2, 3])
    inputs, _ = build("associative_recall", length=8, pairs=2, vocab=8).train.__getitems__(range(6000))
    expect_even([tuple(row) for row in inputs[:, 0:4:2].tolist()], list(itertools.permutations((1, 2, 3), 2)))
    expect_even([tuple(row) for row in inputs[:, 1:4:2].tolist()], list(itertools.permutations((4, 5, 6, 7), 2)))
    expect_even((inputs[:, 4] == inputs[:, 0]).tolist(), [False, True])


def expect_even(found, possible):
    assert set(found) == set(possible)
    mean = len(found) / len(possible)
    chi_squared = sum((found.count(one) - mean) ** 2 / mean for one in possible)
    degrees = len(possible) - 1
    assert chi_squared < degrees * (1 - 2 / (9 * degrees) + 3.72 * (2 / (9 * degrees)) ** 0.5) ** 3  # Wilson, Hilferty


@pytest.mark.parametrize("power", [0.01, 1.0], ids=["near", "uniform"])
def test_gaps_follow_the_power_law_without_replacement(power):
    """As numpy's `choice` with `replace=False` draws them, which the authors use."""
    task = build("associative_recall", length=20, pairs=3, vocab=32, queries=2, power=power)
    inputs, _ = task.train.__getitems__(range(20_000))
    weights = np.arange(1, 8) ** (power - 1)
    weights /= weights.sum()
    found = (inputs[:, 6::2] != 0).double().mean(0).numpy()
    one_first = weights + np.array(
        [sum(weights[j] * w / (1 - weights[j]) for j in range(7) if j != i) for i, w in enumerate(weights)]
    )
    np.testing.assert_allclose(found, one_first, atol=0.02)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 50), st.integers(1, 60))
def test_distinct_numbers_are_distinct_and_in_range(count, more):
    of = count + more - 1
    drawn = draw_distinct(np.random.RandomState(0), 7, count, of)
    assert drawn.shape == (7, count)
    assert all(len(set(row)) == count and min(row) >= 0 and max(row) < of for row in drawn.tolist())


# --- The stream -------------------------------------------------------------------------------------------------------


def test_samples_are_pinned():
    """A resumed run must go on with the same samples, also after an upgrade of NumPy or torch."""
    index = 3 * 1024 + 5
    copying, heads = build("selective_copying").train, build("induction_heads", length=12).train
    assert copying[index][0].tolist() == [0, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 4, 0, 0, 2, 0, 7, 7, 7]
    assert heads[index][0].tolist() == [1, 0, 5, 1, 6, 6, 1, 3, 8, 7, 6, 0]
    recall = build("associative_recall", length=14, pairs=3).train
    assert recall[index][0].tolist() == [11, 25, 14, 19, 8, 26, 11, 0, 14, 0, 8, 0, 0, 0]


STREAMS = {name: build(name).train for name in TASKS}
REFERENCES = {name: stream.__getitems__(range(2500)) for name, stream in STREAMS.items()}


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(TASKS)), st.integers(0, 2499), st.integers(1, 1500))
def test_a_run_goes_on_at_any_place_with_any_batch(name, start, size):
    indices = list(range(start, min(start + size, 2500)))
    for found, expected in zip(STREAMS[name].__getitems__(indices), REFERENCES[name], strict=True):
        assert torch.equal(found, expected[indices])


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(sorted(TASKS)), st.lists(st.integers(0, 2499), max_size=20))
def test_samples_in_any_order_are_the_same(name, indices):
    for found, expected in zip(STREAMS[name].__getitems__(indices), REFERENCES[name], strict=True):
        assert torch.equal(found, expected[indices])


@every_task
def test_stream_is_fresh_endless_and_travels_to_a_worker(name):
    task = build(name)
    inputs, _ = task.train.__getitems__(range(5000))
    assert len(inputs.unique(dim=0)) > 4900  # short sequences come twice at times
    assert not torch.equal(inputs[:1000], inputs[1024:2024])
    fresh = build(name).train
    assert len(pickle.dumps(fresh)) < 10_000
    assert torch.equal(pickle.loads(pickle.dumps(fresh))[4321][0], inputs[4321])
    assert len(fresh) == STREAM_LENGTH
    assert fresh[STREAM_LENGTH - 1][0].shape == task.input_shape
    for index in (-1, STREAM_LENGTH):
        with pytest.raises(IndexError, match="numbered from 0"):
            fresh[index]


@every_task
def test_run_seed_draws_training_samples_and_no_others(name):
    first, again, other = (build(name, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.train[7][0], again.train[7][0])
    rows = list(range(20))
    assert not torch.equal(first.train.__getitems__(rows)[0], other.train.__getitems__(rows)[0])
    for split in ("val", "test"):
        assert torch.equal(getattr(first, split).inputs, getattr(other, split).inputs)
        assert torch.equal(getattr(first, split).targets, getattr(other, split).targets)
    assert torch.equal(build(name, eval_size=60).val.inputs[:40], first.val.inputs)
    assert not torch.equal(first.val.inputs, first.test.inputs)
    assert not torch.equal(first.val.inputs, first.train.__getitems__(range(40))[0])


# --- Loss, metrics, summary -------------------------------------------------------------------------------------------


@every_task
def test_loss_and_metrics_count_the_answers_alone_whatever_the_batches(name):
    task = build(name)
    assert (task.score, task.mode, task.stream, task.input_dtype) == ("accuracy", "max", True, torch.int64)
    targets = task.val.targets
    output = torch.randn(*targets.shape, task.output_size, generator=torch.Generator().manual_seed(0))
    losses, right, whole = [], [], []
    for logits, answers in zip(output, targets, strict=True):
        places = [i for i, answer in enumerate(answers.tolist()) if answer != UNASKED]
        losses += [-logits[i].log_softmax(0)[answers[i]].item() for i in places]
        hits = [int(logits[i].argmax()) == int(answers[i]) for i in places]
        right += hits
        whole.append(all(hits))
    assert task.loss(output, targets).item() == pytest.approx(np.mean(losses), rel=1e-5)
    metrics = task.metrics()
    metrics.update(output[:17], targets[:17])
    metrics.update(output[17:], targets[17:])
    found = {key: value.item() for key, value in metrics.compute().items()}
    expected = {"loss": np.mean(losses), "accuracy": np.mean(right), "sequence_accuracy": np.mean(whole)}
    if name == "induction_heads":  # one answer a sequence
        del expected["sequence_accuracy"]
    assert found == pytest.approx(expected, rel=1e-5)
    knowing = nn.functional.one_hot(targets.clamp_min(0), task.output_size) * 100.0
    knowing[targets == UNASKED] = torch.randn(task.output_size, generator=torch.Generator().manual_seed(1))
    metrics.reset()
    metrics.update(knowing, targets)
    sure = metrics.compute()
    assert sure.pop("loss") < 1e-6
    assert all(value == 1 for value in sure.values())


@pytest.mark.parametrize("name", ["selective_copying", "associative_recall"])
def test_summary_says_when_the_task_was_solved(name):
    task = build(name, threshold=0.9)
    rows = [{"step": float(s), "val/accuracy": a} for s, a in ((10, 0.5), (20, 0.9), (30, 0.7), (40, 1.0))]
    assert task.summarize(rows, nn.Identity()) == {"success": 1.0, "solved_at": 20.0}
    assert task.summarize([rows[0], {"step": 20.0, "val/accuracy": float("nan")}], nn.Identity()) == {"success": 0.0}
    assert task.summarize([], nn.Identity()) == {"success": 0.0}


# --- Other lengths of induction heads ---------------------------------------------------------------------------------


class Knowing(nn.Module):
    """Knows the answer up to a length, and refuses longer sequences than another."""

    def __init__(self, symbols, right_up_to=10**9, takes=10**9):
        super().__init__()
        self.symbols, self.right_up_to, self.takes = symbols, right_up_to, takes
        self.weight = nn.Parameter(torch.zeros(()))
        self.shapes = []

    def forward(self, ids):
        assert not self.training
        self.shapes.append(tuple(ids.shape))
        if ids.shape[1] > self.takes:
            raise ValueError(f"input of shape {tuple(ids.shape)}: must be {self.takes} tokens or less")
        first = (ids == 0).int().argmax(1)
        answers = ids.gather(1, first[:, None] + 1)[:, 0]
        if ids.shape[1] > self.right_up_to:
            answers = torch.zeros_like(answers)
        return nn.functional.one_hot(answers, self.symbols + 1)[:, None].float().expand(-1, ids.shape[1], -1)


def test_accuracy_at_each_test_length_is_told_of_the_model_in_evaluation_mode():
    task = build("induction_heads", test_lengths=[128, 64, 64, 200], test_size=30)
    model = Knowing(8, right_up_to=64)
    found = task.summarize([{"step": 5.0, "val/accuracy": 1.0}], model)
    assert found == {
        "success": 1.0,
        "solved_at": 5.0,
        "accuracy_at_64": 1.0,
        "accuracy_at_128": 0.0,
        "accuracy_at_200": 0.0,
    }
    assert model.training
    assert {shape[1] for shape in model.shapes} == {64, 128, 200}
    assert build("induction_heads", test_lengths=[]).summarize([], model) == {"success": 0.0}


def test_sequences_of_a_test_length_are_sound_and_the_same_in_every_run(monkeypatch):
    seen = []

    def answers(model, ids):
        seen.append(ids)
        return torch.zeros(len(ids), 9)

    monkeypatch.setattr(induction_heads, "_answers", answers)
    for seed in (0, 1):
        build("induction_heads", test_size=12, seed=seed).accuracy_at(50, Knowing(8))
    assert torch.equal(*seen)
    for ids in seen[0].tolist():
        check_induction_heads(ids, [UNASKED] * 49 + [ids[ids.index(0) + 1]], length=50, symbols=8)
    build("induction_heads", test_size=12).accuracy_at(60, Knowing(8))
    assert not torch.equal(seen[2][:, :50], seen[0])


def test_a_model_that_takes_no_longer_sequences_gives_a_statement(logs):
    task = build("induction_heads", test_lengths=[16, 64, 128], test_size=10)
    found = task.summarize([], Knowing(8, takes=32))
    assert found == {
        "success": 0.0,
        "accuracy_at_16": 1.0,
        "untested_lengths": [64, 128],
        "untested_because": "input of shape (10, 64): must be 32 tokens or less",
    }
    assert "test length 64 and beyond: the model does not take them (input of shape (10, 64)" in logs.text
    model = models.create("transformer", LayerFactory("linear"), (32,), 9, width=32, depth=1)
    found = task.summarize([], model)
    assert found["untested_lengths"] == [64, 128]
    assert "length 32 or less" in found["untested_because"]
    with pytest.raises(ValueError, match="8 tokens or less"):  # a fault, and not a length it was not made for
        task.summarize([], Knowing(8, takes=8))


@pytest.mark.parametrize("mixer", ["attention", "mamba"])
def test_a_language_model_takes_long_sequences_in_pieces_and_answers_alike(mixer, monkeypatch):
    torch.manual_seed(0)
    model = Decoder(9, 16, 2, mixer=mixer, mlp=None).eval()
    ids = build("induction_heads", length=50).val.inputs[:6]
    with torch.no_grad():
        whole = model(ids)[:, -1]
        sizes = []
        original = Decoder.next_logits

        def counted(self, ids, cache):
            sizes.append(tuple(ids.shape))
            return original(self, ids, cache)

        monkeypatch.setattr(Decoder, "next_logits", counted)
        torch.testing.assert_close(induction_heads._answers(model, ids), whole, rtol=1e-4, atol=1e-5)
        assert sizes == [(6, 50)]
        monkeypatch.setattr(induction_heads, "TOKENS", 16)
        torch.testing.assert_close(induction_heads._answers(model, ids), whole, rtol=1e-4, atol=1e-5)
        assert sizes[1:] == [(6, 16), (6, 16), (6, 16), (6, 2)]
        monkeypatch.setattr(induction_heads, "SCORES", 1000)
        induction_heads._answers(model, ids[:, :40])
        assert sizes[5:] == [(6, 16), (6, 16), (6, 8)]
        induction_heads._answers(model, ids[:, :50].repeat(1, 4))
        assert sizes[8:] == [(6, 5)] * 40
    assert isinstance(model, CausalLM)


def test_no_more_tokens_than_the_bound_go_through_a_model_at_once(monkeypatch):
    monkeypatch.setattr(induction_heads, "TOKENS", 100)
    model = Knowing(8)
    assert build("induction_heads", test_size=7).accuracy_at(30, model) == 1
    assert model.shapes == [(3, 30), (3, 30), (1, 30)]
    model.shapes.clear()
    assert build("induction_heads", test_size=2).accuracy_at(300, model) == 1
    assert model.shapes == [(1, 300), (1, 300)]


# --- Options, and a run of the trainer --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("selective_copying", {"length": 0}, "length=0: must be a whole number from 1 to 524288"),
        ("selective_copying", {"data": 17}, "data=17: must be a whole number from 1 to 16"),
        ("selective_copying", {"symbols": 2.5}, "symbols=2.5: must be a whole number from 1"),
        ("selective_copying", {"eval_size": 0}, "eval_size=0: must be a whole number from 1"),
        ("selective_copying", {"eval_size": 2**23}, "eval_size=8388608: must be a whole number from 1 to 3532045"),
        ("selective_copying", {"threshold": 1.1}, "threshold=1.1: must be from 0 to 1"),
        ("induction_heads", {"length": 2}, "length=2: must be a whole number from 3"),
        ("induction_heads", {"symbols": 0}, "symbols=0: must be a whole number from 1"),
        ("induction_heads", {"test_lengths": 64}, "test_lengths=64: must be a list of lengths, as [64, 128]"),
        ("induction_heads", {"test_lengths": [64, 2**21]}, "test_lengths=2097152: must be a whole number from 3"),
        ("induction_heads", {"test_size": 2**20}, "test_size=1048576: must be a whole number from 1 to 131072"),
        ("induction_heads", {"threshold": "high"}, "threshold='high': must be a number from 0 to 1"),
        (
            "associative_recall",
            {"length": 15},
            "length=15: must be 16 or more, two for each of pairs=4 and of 4 queries",
        ),
        ("associative_recall", {"pairs": 0}, "pairs=0: must be a whole number from 1"),
        ("associative_recall", {"queries": 9}, "queries=9: must be a whole number from 1 to 4"),
        ("associative_recall", {"vocab": 9}, "vocab=9: must be a whole number from 10 to 65536"),
        ("associative_recall", {"power": -1}, "power=-1: must be from 0 to 10"),
    ],
)
def test_wrong_option_is_named(name, options, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        TASKS[name](**options)


@every_task
def test_a_run_that_was_cut_off_ends_as_one_that_was_not(name, tmp_path):
    def config(folder):
        more = {"test_lengths": [40], "test_size": 20} if name == "induction_heads" else {}
        return make_config(
            folder,
            task={"name": name, "eval_size": 50, **more},
            model={"name": "decoder", "width": 32, "depth": 1},
            layer={"name": "attention"},
            scheduler={"name": "none"},
            trainer={"steps": 8, "eval_every": 4, "batch_size": 300},  # more than one block
        )

    whole = execute(config(tmp_path / "whole"))
    stops = iter([False] * 5 + [True] * 10)
    cut = execute(config(tmp_path / "cut"), should_stop=lambda: next(stops))
    assert cut["status"] == "interrupted"
    assert execute(config(tmp_path / "cut"))["status"] == whole["status"] == "done"
    lines = [lines_without_time(next((tmp_path / folder).glob("*/metrics.jsonl"))) for folder in ("whole", "cut")]
    assert lines[0] == lines[1]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "batch", "steps"), [("selective_copying", 32, 400), ("induction_heads", 16, 500)])
def test_mamba_solves_it_in_seconds(name, batch, steps):
    torch.manual_seed(0)
    task = TASKS[name](test_size=100, test_lengths=[128]) if name == "induction_heads" else TASKS[name]()
    model = Decoder(task.output_size, 32, 2, mixer="mamba", mlp=None)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for step in range(steps):
        inputs, targets = task.train.__getitems__(range(step * batch, (step + 1) * batch))
        task.loss(model(inputs), targets).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    metrics = task.metrics()
    with torch.no_grad():
        metrics.update(model.eval()(task.val.inputs), task.val.targets)
    assert metrics.compute()["accuracy"] >= task.threshold
    if name == "induction_heads":
        assert task.accuracy_at(128, model) >= 0.95
