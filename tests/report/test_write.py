import csv
import io
import json
import os
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from archzoo.report import console_table, load_comparison, write_report
from archzoo.report.markdown import text_markdown

HOSTILE = "<b>&\"'|_*`$x^2$\\[](y)%#{~} é漢🙂"


def everything(folder, write):
    """A comparison with most of what can go wrong."""
    write(
        folder / "d", layer="kan", seed=7, status="diverged", score=None, diverged={"step": 120, "module": "layers.1"}
    )
    write(folder / "f", layer="phm", seed=0, status="failed", score=None, error=f"ValueError: {HOSTILE}\nmore")
    write(folder / "r", layer="nau", seed=0, status="running", score=None)
    write(folder / "i", layer="linear", seed=9, status="interrupted", score=None)
    for grid in (3, 5):
        write(folder / f"g{grid}", layer="selectable_kan", seed=0, options={"grid_size": grid, "kind": HOSTILE * grid})
    return folder


class Page(HTMLParser):
    """What a page refers to, its text, and its tags left open."""

    VOID = ("meta", "path", "rect", "use", "br", "line", "i")

    def __init__(self, path: Path):
        super().__init__()
        self.links: list[str] = []
        self.ids: list[str] = []
        self.words: list[str] = []
        self.tags: list[str] = []
        self.raw = path.read_text(encoding="utf-8")
        self.feed(self.raw)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("href", "src", "xlink:href", "data", "action", "poster"):
                self.links.append(value or "")
            if name == "id":
                self.ids.append(value or "")

    def handle_data(self, data):
        self.words.append(data)


def test_all_files_are_written_and_the_page_needs_nothing_else(build, write):
    folder = everything(build({"linear": [0.90, 0.91, 0.92], "kan": [0.93, 0.95, 0.94]}), write)
    path = write_report(folder)
    assert path == folder / "report.html"
    assert {file.name for file in folder.iterdir() if file.is_file()} == {
        "report.html",
        "report.md",
        "report.csv",
        "report.tex",
    }
    assert {file.name for file in (folder / "figures").iterdir()} == {
        "ranking.svg",
        "curves-score.svg",
        "curves-loss.svg",
        "score-parameters.svg",
        "score-flops.svg",
        "score-step-time.svg",
        "score-memory.svg",
    }
    page = Page(path)
    assert "script" not in page.tags
    assert page.tags.count("svg") == 7
    for link in page.links:
        assert link.startswith("#") or (folder / link).is_file(), link
    assert not re.search(r"url\((?!#)|@import|https?://(?!www\.w3\.org/)", page.raw)
    assert len(page.ids) == len(set(page.ids))
    assert all(link[1:] in page.ids for link in page.links if link.startswith("#"))


def test_the_page_says_who_leads_what_failed_and_how_it_was_computed(build, write):
    folder = everything(build({"linear": [0.90, 0.91, 0.92], "kan": [0.93, 0.95, 0.94]}), write)
    text = Page(write_report(folder)).text
    for words in (
        "kan leads by 3.00 points, not separable from linear with 3 seeds.",
        "6 common seeds are needed",
        "diverged at step 120 in layers.1",
        f"failed: ValueError: {HOSTILE}",
        "still marked as running",
        "Student's t over seeds",
        "paired permutation test",
        "Holm-corrected",
        "python train.py experiment=digits",
        "parameters matched to those of linear (8,970) to within 1 %",
        "AMD EPYC 7B13, 2 cores",
        "torch 2.14.1",
        "1f3a9c0b2d7e",
        "linear-2",
        "-0.1 %",
        "no CI (1 seed)",
    ):
        assert words in text, words


def test_hostile_text_is_shown_as_it_is_in_every_format(build, write):
    folder = everything(build({"linear": [0.90, 0.91], "kan": [0.93, 0.95]}), write)
    page = Page(write_report(folder))
    assert "b" not in page.tags
    label = f"selectable_kan (grid_size=3, kind={HOSTILE * 3})"
    assert label in page.text
    rows = csv.DictReader(io.StringIO((folder / "report.csv").read_text(encoding="utf-8")))
    (row,) = [row for row in rows if row["label"] == label]
    assert row["n_seeds"] == "1"
    assert text_markdown(label) in (folder / "report.md").read_text(encoding="utf-8")
    for file in (folder / "figures").iterdir():
        ET.parse(file)


def test_markdown_tables_have_as_many_cells_in_every_row(build, write):
    folder = everything(build({"linear": [0.90, 0.91], "kan": [0.93, 0.95]}), write)
    write_report(folder)
    tables = re.findall(r"(?:^\|.*\n)+", (folder / "report.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(tables) == 3
    for table in tables:
        cells = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(cells) == 1, table


def test_latex_is_balanced_and_has_as_many_cells_in_every_row(build, write):
    folder = everything(build({"linear": [0.90, 0.91], "kan": [0.93, 0.95]}), write)
    write_report(folder)
    text = (folder / "report.tex").read_text(encoding="utf-8")
    assert r"\toprule" in text
    assert r"\bottomrule" in text
    bare = re.sub(r"\\[&%$#_{}]", "", re.sub(r"^%.*$", "", text, flags=re.MULTILINE))
    assert bare.count("{") == bare.count("}")
    assert bare.count("$") % 2 == 0
    assert not re.search(r"[#%_]", bare)
    for table in re.findall(r"\\begin\{tabular\}(.*?)\\end\{tabular\}", bare, flags=re.DOTALL):
        columns = re.match(r"\{@\{\}([lr]+)@\{\}\}", table)
        assert columns is not None
        rows = [line for line in table.splitlines() if line.strip().endswith(r"\\")]
        assert {line.count("&") for line in rows} == {len(columns[1]) - 1}


def test_csv_has_full_numbers(build):
    folder = build({"linear": [0.9, 1 / 3], "kan": [0.95, 0.5]})
    write_report(folder)
    rows = list(csv.DictReader(io.StringIO((folder / "report.csv").read_text(encoding="utf-8"))))
    assert [row["label"] for row in rows] == ["kan", "linear"]
    assert float(rows[1]["score_mean"]) == (0.9 + 1 / 3) / 2
    assert (rows[0]["ties_baseline"], rows[1]["baseline"], rows[0]["p"]) == ("true", "true", "0.5")
    assert (rows[0]["parameters"], rows[0]["budget_deviation"], rows[0]["done"]) == ("8957", "-0.0014", "2")


def test_a_second_call_writes_the_same_bytes(build, write):
    folder = everything(build({"linear": [0.9] * 3 + [0.8] * 9, "kan": [0.95] * 3 + [0.7] * 9}), write)

    def contents():
        return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    write_report(folder)
    first = contents()
    write_report(folder)
    assert contents() == first


def test_a_report_is_replaced_whole_or_not_at_all(build, monkeypatch):
    folder = build({"linear": [0.9, 0.8]})
    write_report(folder)
    before = (folder / "report.html").read_text()
    (folder / "linear-0" / "run.json").write_text("{}")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_report(folder)
    assert (folder / "report.html").read_text() == before
    assert not list(folder.rglob("*.tmp"))


def test_several_tasks_have_a_matrix_and_a_section_each(build, write):
    folder = build({"linear": [0.9, 0.8], "kan": [0.95, 0.7]}, name="both")
    for seed in (0, 1):
        write(folder / f"w{seed}", layer="kan", task="wine", seed=seed, metric="mse", mode="min")
    page = Page(write_report(folder))
    assert "2 tasks, ranked one by one" in page.text
    assert "Task wine" in page.text
    assert (folder / "figures" / "task2-ranking.svg").is_file()
    assert len(page.ids) == len(set(page.ids))


def test_tasks_of_one_metric_are_columns_with_mean_rank_and_firsts(build, write):
    """The models x datasets table that users ask for: wandb#1657."""
    folder = build({"linear": [0.9, 0.8], "kan": [0.95, 0.7], "phm": [0.5, 0.6]}, name="both")
    for seed in (0, 1):
        write(folder / f"w{seed}", layer="kan", task="wine", seed=seed, score=0.7 + 0.1 * seed)
        write(folder / f"v{seed}", layer="linear", task="wine", seed=seed, score=0.6 + 0.1 * seed)
    page = Page(write_report(folder))
    assert "All tasks: test accuracy %" in page.text
    markdown = (folder / "report.md").read_text()
    assert "| Contestant | digits | wine | Mean rank | First in |" in markdown
    lines = [line.split(" | ") for line in markdown.splitlines() if re.match(r"\| (kan|linear|phm) \| \d", line)][:3]
    assert [(line[0], line[3], line[4][:6]) for line in lines] == [
        ("| kan", "1.50", "1 of 2"),
        ("| linear", "1.50", "1 of 2"),
        ("| phm", "3.00", "0 of 1"),
    ]


def test_a_baseline_can_be_named(build):
    folder = build({"linear": [0.9, 0.8], "kan": [0.95, 0.7]})
    assert "Difference to kan" in Page(write_report(folder, baseline="kan")).text
    with pytest.raises(ValueError, match="did you mean 'linear'"):
        write_report(folder, baseline="linar")


def test_a_hundred_runs_are_all_there(build, write):
    folder = build({f"layer{i}": [0.9 + 0.001 * i + 0.002 * seed for seed in range(8)] for i in range(12)}, name="many")
    for seed in range(4):
        write(folder / f"x{seed}", layer="linear", seed=seed)
    page = Page(write_report(folder))
    assert "100 done" in page.text
    assert all(f"layer{i}-{seed}" in page.text for i in range(12) for seed in range(8))


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers(-(10**400), 10**400) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


@pytest.fixture(scope="module", params=["plain", pytest.param("sized", marks=pytest.mark.slow)])
def records(request, tmp_path_factory):
    """A folder with a few runs to spoil, and what their run.json held."""
    from importlib import util

    spec = util.spec_from_file_location("report_builder", Path(__file__).parent / "conftest.py")
    assert spec is not None
    assert spec.loader is not None
    builder = util.module_from_spec(spec)
    spec.loader.exec_module(builder)
    root = tmp_path_factory.mktemp("fuzz")
    if request.param == "plain":
        folder = builder.build_comparison(root, {"linear": [0.9, 0.8], "kan": [0.95]})
    else:
        laws = {"linear": lambda size, seed: 1 / size, "kan": lambda size, seed: 1 / size**2}
        folder = builder.build_sized(root, laws, sizes=(100, 200), seeds=1)
    return folder, {path: json.loads(path.read_text()) for path in folder.glob("*/run.json")}


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_no_run_json_can_keep_the_report_from_being_written(records, data):
    folder, whole = records
    for path, record in whole.items():
        spoilt = json.loads(json.dumps(record))
        for _ in range(data.draw(st.integers(0, 4))):
            inner, keys = spoilt, list(spoilt)
            key = data.draw(st.sampled_from(keys))
            while isinstance(inner[key], dict) and inner[key] and data.draw(st.booleans()):
                inner = inner[key]
                key = data.draw(st.sampled_from(list(inner)))
            inner[key] = data.draw(json_values)
        path.write_text(json.dumps(spoilt))
    page = Page(write_report(folder))
    assert page.tags[-1]
    for file in (folder / "figures").iterdir():
        ET.parse(file)
    console_table(load_comparison(folder))
