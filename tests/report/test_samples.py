"""The section 'Sampled text': the best run's text of each contestant, escaped, and only where there is one."""

import io

import pytest
from rich.console import Console

from archzoo.report import console_table, load_comparison, write_report
from archzoo.report.samples import LONGEST, samples

HOSTILE = "\n<script>alert(1)</script> & </pre>\n```\n\tx[0] *y*\x00\x1b[31m é\n"


def console_text(comparison):
    out = io.StringIO()
    Console(file=out, width=100, force_terminal=False).print(console_table(comparison, columns=100))
    return out.getvalue()


@pytest.fixture
def comparison(tmp_path, write):
    """Two contestants of two seeds, of which one wrote a hostile text in its better run; lower scores are better."""
    folder = tmp_path / "lm"
    common = {"task": "char_lm", "metric": "bits_per_byte", "mode": "min"}
    for layer, seed, score, sample in [
        *(("mamba", 0, 2.5, "worse"), ("mamba", 1, 2.4, HOSTILE)),
        *(("attention", 0, 2.6, "def f(x):\n    return x"), ("attention", 1, 2.7, "worse")),
        *(("linear", 0, 2.9, None), ("linear", 1, 2.8, 5)),
    ]:
        summary = {"corpus": "python", "corpus_bytes": [9, 1, 1], **({} if sample is None else {"sample": sample})}
        write(folder / f"{layer}{seed}", layer=layer, seed=seed, score=score, task_summary=summary, **common)
    return folder


def test_the_text_is_that_of_the_best_run_of_each_contestant_that_has_one(comparison):
    found = {sample.label: sample.text for sample in samples(load_comparison(comparison))}
    shown = HOSTILE.replace("\x00", "\ufffd").replace("\x1b", "\ufffd")
    assert found == {"mamba, seed 1": shown, "attention, seed 0": "def f(x):\n    return x"}


def test_a_run_without_a_text_is_passed_over(tmp_path, write):
    common = {"task": "char_lm", "metric": "accuracy", "mode": "max"}
    write(tmp_path / "lm" / "a", score=0.9, seed=0, **common)
    write(tmp_path / "lm" / "b", score=0.7, seed=1, task_summary={"sample": "second"}, **common)
    write(tmp_path / "lm" / "c", score=0.6, seed=2, task_summary={"sample": "third"}, **common)
    write(tmp_path / "lm" / "d", score=None, seed=3, status="failed", task_summary={"sample": "no"}, **common)
    assert [(s.label, s.text) for s in samples(load_comparison(tmp_path / "lm"))] == [("linear, seed 1", "second")]


def test_a_long_text_is_cut(tmp_path, write):
    write(tmp_path / "lm" / "a", task_summary={"sample": "x" * 5000})
    (sample,) = samples(load_comparison(tmp_path / "lm"))
    assert sample.text == "x" * (LONGEST - 1) + "…"
    assert sample.line == "x" * 159 + "…"


def test_the_page_shows_the_texts_escaped(comparison):
    page = write_report(comparison).read_text(encoding="utf-8")
    assert page.count(">Sampled text<") == 1
    assert "<script" not in page
    shown = "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &lt;/pre&gt;"
    assert f"<figcaption>mamba, seed 1</figcaption>\n<pre>\n\n{shown}\n" in page
    assert "<pre>\ndef f(x):\n    return x</pre>" in page
    assert "worse" not in page.split(">Sampled text<")[1].split("<h2>")[0]
    assert not any(ord(c) < 32 and c not in "\n\t" for c in page)


def test_markdown_fences_a_text_that_has_fences_itself(comparison):
    write_report(comparison)
    report = (comparison / "report.md").read_text(encoding="utf-8")
    assert "\n## Sampled text\n\n- " in report
    assert "- mamba, seed 1:\n\n````\n\n<script>" in report
    assert "- attention, seed 0:\n\n```\ndef f(x):\n    return x\n```\n" in report


def test_the_terminal_gets_the_beginning_in_one_line(comparison):
    shown = console_text(load_comparison(comparison))
    assert "attention, seed 0, wrote: def f(x):⏎    return x" in shown
    assert "mamba, seed 1, wrote: ⏎<script>alert(1)</script>" in shown
    assert "\x1b" not in shown


def test_without_texts_there_is_no_such_section(build):
    folder = build({"linear": [0.9, 0.91], "kan": [0.92, 0.93]})
    assert "Sampled text" not in write_report(folder).read_text(encoding="utf-8")
    assert "Sampled text" not in (folder / "report.md").read_text(encoding="utf-8")
    assert "wrote:" not in console_text(load_comparison(folder))
