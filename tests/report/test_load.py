import json
import subprocess
import sys

import pytest

from archzoo.report import load_comparison


def test_importing_the_report_is_light():
    heavy = ("numpy", "scipy", "matplotlib", "torch", "rich", "jinja2")
    code = f"import sys, archzoo.report; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_runs_that_differ_in_seed_only_are_one_contestant(build):
    comparison = load_comparison(build({"linear": [0.9, 0.8, 0.7], "kan": [0.9]}))
    assert [(group.label, len(group.runs)) for group in comparison.groups] == [("kan", 1), ("linear", 3)]
    assert comparison.groups[1].scores == {0: 0.9, 1: 0.8, 2: 0.7}
    assert (comparison.metric, comparison.mode, comparison.score_split) == ("accuracy", "max", "test")


def test_names_paths_and_devices_do_not_tell_contestants_apart(build, write):
    folder = build({"kan": [0.9]})
    config = json.loads((folder / "kan-0" / "run.json").read_text())["config"]
    other = {**config, "seed": 1, "name": "again", "device": "cuda", "paths": {"data": "elsewhere"}}
    other["task"] = {**config["task"], "seed": 1}  # interpolated from the seed
    write(folder / "kan-1", layer="kan", seed=1, change={"config": other})
    assert [group.label for group in load_comparison(folder).groups] == ["kan"]


def test_contestants_with_one_layer_are_told_apart_by_what_differs(build, write):
    folder = build({"linear": [0.9]})
    for grid in (3, 5):
        write(folder / f"k{grid}", layer="kan", options={"grid_size": grid, "spline_order": 3})
    write(folder / "l", change={"config": {"layer": {"name": "linear"}, "optimizer": {"lr": 0.1}, "seed": 0}})
    labels = {group.label for group in load_comparison(folder).groups}
    assert {"kan (grid_size=3)", "kan (grid_size=5)"} < labels
    assert len(labels) == 4
    assert any("optimizer.lr" in label or "lr=0.1" in label for label in labels)


def test_ambiguous_option_keys_are_spelt_out(tmp_path, write):
    for i, config in enumerate(({"a": {"x": 1}, "b": {"x": 1}}, {"a": {"x": 2}, "b": {"x": 1.5e-5}})):
        write(tmp_path / str(i), layer="kan", change={"config": config})
    labels = [group.label for group in load_comparison(tmp_path).groups]
    assert labels == ["kan (a.x=1, b.x=1)", "kan (a.x=2, b.x=1.5e-05)"]


def test_a_run_that_failed_before_it_had_a_config_joins_the_only_contestant_of_its_layer(build, write):
    folder = build({"kan": [0.9]})
    write(folder / "early", layer="kan", seed=1, status="failed", score=None, change={"config": None})
    (group,) = load_comparison(folder).groups
    assert group.statuses == {"done": 1, "failed": 1}


def test_other_files_and_folders_are_ignored(build):
    folder = build({"kan": [0.9]})
    (folder / "figures").mkdir()
    (folder / "run.json").mkdir()
    (folder / "notes.txt").write_text("x")
    assert len(load_comparison(folder).runs) == 1


def test_a_seed_that_is_not_the_runs_own_may_equal_it(tmp_path, write):
    for seed in (0, 1, 2):
        config = {"layer": {"name": "linear"}, "callbacks": {"sample_text": {"seed": 0}}, "seed": seed}
        write(tmp_path / "c" / str(seed), seed=seed, change={"config": config})
    (group,) = load_comparison(tmp_path / "c").groups
    assert (group.label, sorted(group.scores)) == ("linear", [0, 1, 2])


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", "\xff\xfe", '{"seed": ' + "9" * 5000 + "}"])
def test_an_unreadable_run_counts_as_failed(build, content):
    folder = build({"kan": [0.9]})
    (folder / "broken").mkdir()
    (folder / "broken" / "run.json").write_text(content, encoding="latin-1")
    broken = next(run for run in load_comparison(folder).runs if run.id == "broken")
    assert broken.status == "failed"
    assert "run.json" in (broken.trouble or "")


def test_missing_keys_are_none(tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "run.json").write_text("{}")
    (run,) = load_comparison(tmp_path).runs
    assert (run.status, run.layer, run.task, run.seed, run.score) == (
        "unknown",
        "unknown layer",
        "unknown task",
        None,
        None,
    )
    assert run.metrics() == []


def test_numbers_that_are_not_finite_are_none(tmp_path, write):
    for i, value in enumerate((float("nan"), float("inf"), 1e300, "0.9", True)):
        score = {"metric": "accuracy", "mode": "max", "split": "test", "value": value, "step": 1}
        write(tmp_path / str(i), seed=i, change={"score": score})
    runs = load_comparison(tmp_path).runs
    assert [run.score for run in runs] == [None] * 5
    assert all(run.trouble == "done, but without a finite score" for run in runs)


def test_of_an_error_the_first_line_is_kept_and_control_characters_go(tmp_path, write):
    write(tmp_path / "r", status="failed", score=None, error="\n\x1b[31mValueError:\t no\x00\nTraceback")
    (run,) = load_comparison(tmp_path).runs
    assert run.error == "[31mValueError: no"


def test_a_score_of_another_metric_is_not_averaged_in(build, write):
    folder = build({"kan": [0.9, 0.8]})
    write(folder / "other", layer="kan", seed=2, score=3.0, metric="loss", mode="min")
    (group,) = load_comparison(folder).groups
    assert group.scores == {0: 0.9, 1: 0.8}
    assert "its score is test loss (min)" in (next(run for run in group.runs if run.id == "other").trouble or "")


def test_of_two_runs_with_one_seed_the_last_counts(build, write):
    folder = build({"kan": [0.9]})
    write(folder / "a-later", layer="kan", seed=0, score=0.5, change={"ended": "2026-06-01T00:00:00"})
    (group,) = load_comparison(folder).groups
    assert group.scores == {0: 0.5}


def test_the_last_metrics_line_may_be_cut_off(tmp_path, write):
    run_folder = write(tmp_path / "r", metrics=False)
    (run_folder / "metrics.jsonl").write_text('{"step": 1, "train/loss": NaN}\n\n{"step": 2}\n[1]\n{"step": 3, "tr')
    (run,) = load_comparison(tmp_path).runs
    assert [record["step"] for record in run.metrics()] == [1, 2]


def test_tasks_are_split(build, write):
    folder = build({"kan": [0.9]})
    write(folder / "w", layer="kan", task="wine")
    comparison = load_comparison(folder)
    assert comparison.tasks == ("digits", "wine")
    assert [group.label for group in comparison.groups] == ["kan", "kan"]
    assert [len(part.runs) for part in comparison.split()] == [1, 1]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: None, "no sub-folder has a run.json"),
        (lambda folder: (folder / "run.json").write_text("{}"), "it is a run itself"),
        (
            lambda folder: (folder / "a/b").mkdir(parents=True) or (folder / "a/b/run.json").write_text("{}"),
            "comparisons",
        ),
    ],
)
def test_a_folder_without_runs_is_refused_with_words(tmp_path, make, words):
    make(tmp_path)
    with pytest.raises(ValueError, match=words):
        load_comparison(tmp_path)


def test_a_missing_folder_is_refused_with_words(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        load_comparison(tmp_path / "nowhere")


def functions_of(folder, write, *options, **what):
    for i, task_options in enumerate(options):
        write(folder / f"r{i}", layer="kan", task="functions", task_options=task_options, **what)
    return load_comparison(folder)


def test_another_option_of_a_task_is_another_task(tmp_path, write):
    comparison = functions_of(tmp_path, write, {"function": "xy", "noise": 0.0}, {"function": "exp_sin", "noise": 0.0})
    assert comparison.tasks == ("exp_sin", "xy")
    assert [(group.task, group.label) for group in comparison.groups] == [("exp_sin", "kan"), ("xy", "kan")]


@pytest.mark.parametrize(
    ("options", "tasks"),
    [
        ([{"noise": 0.0}, {"noise": 0.1}], ("functions (noise=0)", "functions (noise=0.1)")),
        ([{"exact": True}, {"exact": False}], ("functions (exact=false)", "functions (exact=true)")),
        ([{"f": "xy", "n": 1}, {"f": "j0", "n": 2}], ("functions (f=j0, n=2)", "functions (f=xy, n=1)")),
        ([{"function": "xy"}, {"function": "xy", "younger": 3}], ("functions",)),
        ([{"function": "xy", "seed": 0}, {"function": "xy"}], ("functions",)),
    ],
    ids=str,
)
def test_a_task_is_called_by_what_differs(tmp_path, write, options, tasks):
    assert functions_of(tmp_path, write, *options).tasks == tasks


def test_beside_other_tasks_the_name_is_told_too(tmp_path, write):
    write(tmp_path / "d", task="digits")
    comparison = functions_of(tmp_path, write, {"function": "xy"}, {"function": "j0"})
    assert comparison.tasks == ("digits", "functions (function=j0)", "functions (function=xy)")


def test_a_contestant_has_one_label_on_all_tasks(tmp_path, write):
    write(tmp_path / "more", layer="kan", task="functions", task_options={"function": "xy"}, options={"grid_size": 9})
    comparison = functions_of(tmp_path, write, {"function": "xy"}, {"function": "j0"}, options={"grid_size": 3})
    assert [(group.task, group.label) for group in comparison.groups] == [
        ("j0", "kan (grid_size=3)"),
        ("xy", "kan (grid_size=3)"),
        ("xy", "kan (grid_size=9)"),
    ]


def test_a_width_that_the_budget_replaces_tells_no_contestants_apart(tmp_path, write):
    for layer, vary in (("linear", {}), ("kan", {"kan": "grid_size"})):
        for width in (3, 5):
            config = {"model": {"width": width}, "budget": {"to": 1000, "vary": vary}}
            write(tmp_path / f"{layer}{width}", layer=layer, seed=width, **config)
    labels = [group.label for group in load_comparison(tmp_path).groups]
    assert labels == ["kan (width=3)", "kan (width=5)", "linear"]
