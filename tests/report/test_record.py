"""What `python -m benchmarks record` and `readme` make of comparisons of several tasks and sizes."""

import json

import pytest

from benchmarks import readme
from benchmarks.record import comparison_record, main


def law(size, seed):
    return 3.0 * (size / 100) ** -3 * (1 + 0.1 * seed)


def test_a_record_has_tasks_sizes_points_and_exponents(build_sizes):
    folder = build_sizes({"kan": law, "linear": lambda n, s: 10 / n * (1 + s)}, functions=("xy", "j0"))
    record = json.loads(json.dumps(comparison_record(folder, "python train.py experiment=functions")))
    assert [(row["task"], row["size"], row["rank"], row["series"]) for row in record["rows"]][:3] == [
        ("j0", "100 parameters", 1, "linear"),
        ("j0", "100 parameters", 2, "kan"),
        ("j0", "200 parameters", 1, "linear"),
    ]
    kan = next(line for line in record["series"] if (line["task"], line["label"]) == ("xy", "kan"))
    assert kan["exponent"] == pytest.approx(3)
    assert [point["parameters"] for point in kan["points"]] == [100, 200, 400]
    assert {place["label"]: place["contests"] for place in record["standings"]} == {"kan": 6, "linear": 6}
    table = readme.comparison_table(record)
    assert "| `xy` | `linear` 0.15 |" in table
    assert table.splitlines()[2].endswith("| 3.00 ± 0.00 | 1.00 ± 0.00 |")
    assert "(100 to 400 parameters)" in table
    assert "commit 1f3a9c0b2d" in table


def test_one_task_of_several_sizes_has_a_line_for_each(build_sizes):
    record = comparison_record(build_sizes({"kan": law, "linear": lambda n, s: 10 / n}), "x")
    lines = readme.comparison_table(record).splitlines()
    assert lines[0].startswith("| size | | layer | rmse ± 95 % CI |")
    assert lines[2].startswith("| 100 parameters | 1 | `linear` | 0.1 ± 0 | – | 100 (-0.1%) |")
    assert len([line for line in lines if line.startswith("|")]) == 2 + 6


def test_tasks_without_sizes_have_every_mean(build, write):
    folder = build({"linear": [0.9, 0.8], "kan": [0.95, 0.7]})
    for seed in (0, 1):
        write(folder / f"w{seed}", layer="kan", task="wine", seed=seed, score=0.7)
    assert "| `digits` | 0.825 | **0.85** |" in readme.comparison_table(comparison_record(folder, "x"))


def test_a_comparison_in_which_all_failed_can_be_recorded(build):
    record = comparison_record(build({"linear": [None], "kan": [None]}), "x")
    assert [row["mean"] for row in record["rows"]] == [None, None]
    assert "| – | `kan` | – ± – |" in readme.comparison_table(record)


def test_every_marked_place_of_the_readme_gets_its_table(build, tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.record.RESULTS", tmp_path / "results")
    monkeypatch.setattr(readme, "RESULTS", tmp_path / "results")
    monkeypatch.setitem(readme.OWN_TABLES, "layers", lambda: "LAYERS")
    for name in ("digits", "other"):
        main([str(build({"linear": [0.9], "kan": [0.8]}, name=name))])

    def place(name):
        return f"<!-- {name}: python -m benchmarks readme -->\nstale\n<!-- end -->\n"

    text = readme.render(f"a\n{place('layers')}b\n{place('digits')}c\n{place('other')}d")
    assert "stale" not in text
    assert readme.render(text) == text
    parts = text.split("<!-- end -->")
    assert "LAYERS" in parts[0]
    assert "experiment=digits" in parts[1]
    assert "experiment=other" in parts[2]
