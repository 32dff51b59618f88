"""Contestants whose settings were tuned are shown at their best by validation, and the test score has no say."""

import csv
import io
import json
import re

import pytest
from rich.console import Console

from archzoo.report import compare_reports, console_table, load_comparison, rank, write_report
from archzoo.report.sections import report_sections
from benchmarks import readme
from benchmarks.record import comparison_record

LR = ("optimizer.lr",)


def trials(write, folder, layer, values, **common):
    """Runs of a layer: learning rate -> seed -> (validation, test), or the status of a run that went wrong."""
    for lr, by_seed in values.items():
        for seed, told in by_seed.items():
            what = {"layer": layer, "seed": seed, "optimizer": {"lr": lr}, "tune": LR} | common
            what |= {"status": told, "score": None} if isinstance(told, str) else {}
            what |= {} if isinstance(told, str) else {"validation": told[0], "score": told[1]}
            write(folder / f"{layer}-{lr:g}-{seed}", **what)
    return folder


def tuning(folder, layer="kan"):
    (group,) = [group for group in load_comparison(folder).groups if group.layer == layer]
    return group


def test_the_best_value_by_validation_is_shown_whatever_the_test_score(write, tmp_path):
    values = {1e-3: {0: (0.8, 0.99)}, 3e-3: {0: (0.9, 0.5)}, 1e-2: {0: (0.7, 0.98)}}
    folder = trials(write, tmp_path / "t", "kan", values)
    trials(write, folder, "linear", {1e-3: {0: (0.6, 0.6)}, 3e-3: {0: (0.5, 0.9)}})
    rows = {row.label: row for row in rank(load_comparison(folder))}
    assert {label: row.values for label, row in rows.items()} == {"kan": (0.5,), "linear": (0.6,)}
    assert rows["kan"].notes[0] == "lr=0.003, the best of 3 by validation score"
    assert [trial.name for trial in rows["kan"].tuning.trials] == ["lr=0.001", "lr=0.003", "lr=0.01"]
    assert rows["kan"].tuning.warnings == ()
    assert rows["linear"].tuning.warnings == ("lr=0.001 is the smallest tried",)


def test_the_smallest_loss_is_the_best(write, tmp_path):
    values = {1e-3: {0: (0.8, 0.1)}, 3e-3: {0: (0.3, 0.9)}, 1e-2: {0: (0.7, 0.1)}}
    folder = trials(write, tmp_path / "t", "kan", values, metric="loss", mode="min")
    assert tuning(folder).tuning.chosen.name == "lr=0.003"


def test_more_seeds_of_the_winner_do_not_change_the_choice(write, tmp_path):
    values = {1e-3: {0: (0.8, 0.8)}, 3e-3: {0: (0.9, 0.9), 1: (0.2, 0.2), 2: (0.1, 0.1)}}
    group = tuning(trials(write, tmp_path / "t", "kan", values))
    assert group.tuning.chosen.name == "lr=0.003"
    assert group.scores == {0: 0.9, 1: 0.2, 2: 0.1}
    assert group.tuning.seeds == (0,)
    assert [trial.mean for trial in group.tuning.trials] == [0.8, 0.9]


def test_the_mean_over_the_common_seeds_decides(write, tmp_path):
    values = {1e-3: {0: (0.8, 0.1), 1: (0.8, 0.1), 2: (0.0, 0.1)}, 3e-3: {0: (0.9, 0.1), 1: (0.6, 0.1)}}
    group = tuning(trials(write, tmp_path / "t", "kan", values))
    assert group.tuning.chosen.name == "lr=0.001"
    assert group.tuning.seeds == (0, 1)


def test_a_value_that_diverged_loses_and_is_named(write, tmp_path):
    values = {1e-3: {0: (0.8, 0.8)}, 3e-3: {0: (0.7, 0.7)}, 1e-2: {0: (0.95, 0.9), 1: "diverged"}}
    group = tuning(trials(write, tmp_path / "t", "kan", values))
    assert group.tuning.chosen.name == "lr=0.001"
    assert group.tuning.warnings == ("lr=0.001 is the smallest tried", "lr=0.01 diverged in seed 1")


def test_a_diverged_value_bounds_the_search_and_a_failed_one_does_not(write, tmp_path):
    values = {1e-3: {0: (0.7, 0.7)}, 3e-3: {0: (0.8, 0.8)}, 1e-2: {0: "diverged"}}
    group = tuning(trials(write, tmp_path / "a", "kan", values))
    assert group.tuning.warnings == ("lr=0.01 diverged in seed 0",)
    values[1e-2] = {0: "failed", 1: "running"}
    group = tuning(trials(write, tmp_path / "b", "kan", values))
    assert group.tuning.warnings == (
        "lr=0.003 is the largest tried",
        "lr=0.01 failed in seed 0",
        "lr=0.01 is not finished in seed 1",
    )


def test_where_every_value_diverged_in_some_seed_the_best_of_the_rest_is_taken_and_said(write, tmp_path):
    values = {1e-3: {0: (0.8, 0.8), 1: "diverged"}, 3e-3: {0: (0.9, 0.9), 1: "diverged"}}
    group = tuning(trials(write, tmp_path / "t", "kan", values))
    assert group.tuning.chosen.name == "lr=0.003"
    assert "every value with a score diverged in some seed" in group.tuning.warnings


def test_one_value_is_no_search(write, tmp_path):
    group = tuning(trials(write, tmp_path / "t", "kan", {1e-3: {0: (0.8, 0.8), 1: (0.7, 0.7)}}))
    assert group.tuning.warnings == ("only lr=0.001 was tried",)
    assert group.scores == {0: 0.8, 1: 0.7}


def test_without_a_common_seed_it_says_so(write, tmp_path):
    group = tuning(trials(write, tmp_path / "t", "kan", {1e-3: {0: (0.8, 0.8)}, 3e-3: {1: (0.9, 0.9)}}))
    assert group.tuning.chosen.name == "lr=0.003"
    assert "no seed in common" in " ".join(group.tuning.warnings)


def test_without_validation_scores_nothing_is_chosen_by_the_test_score(write, tmp_path):
    folder = trials(
        write, tmp_path / "t", "kan", {1e-3: {0: (0.8, 0.8)}, 3e-3: {0: (0.9, 0.9)}}, change={"summary": {}}
    )
    group = tuning(folder)
    assert group.tuning.chosen is None
    assert group.scores == {}
    assert group.tuning.warnings[0] == "nothing could be chosen: no run has a validation score"
    (row,) = rank(load_comparison(folder))
    assert "2 x no validation score to choose optimizer.lr by" in row.notes
    assert write_report(folder).exists()


def test_contestants_keep_their_other_options_and_are_tuned_each_for_itself(write, tmp_path):
    folder = tmp_path / "t"
    for grid, best in ((3, 1e-3), (5, 3e-3)):
        for lr in (1e-3, 3e-3):
            what = {
                "optimizer": {"lr": lr},
                "tune": LR,
                "options": {"grid_size": grid},
                "validation": float(lr == best),
            }
            write(folder / f"{grid}-{lr}", layer="kan", score=0.1 * grid, **what)
    chosen = {group.label: group.tuning.chosen.name for group in load_comparison(folder).groups}
    assert chosen == {"kan (grid_size=3)": "lr=0.001", "kan (grid_size=5)": "lr=0.003"}


def test_two_keys_are_tuned_together_each_with_its_own_edges(write, tmp_path):
    folder = tmp_path / "t"
    for lr in (1e-3, 3e-3, 1e-2):
        for decay in (0.0, 0.1):
            what = {"optimizer": {"lr": lr, "weight_decay": decay}, "tune": ("optimizer.lr", "optimizer.weight_decay")}
            write(folder / f"{lr}-{decay}", layer="kan", validation=1.0 - abs(lr - 3e-3) + decay, **what)
    (group,) = load_comparison(folder).groups
    assert group.label == "kan"
    assert group.tuning.chosen.name == "lr=0.003, weight_decay=0.1"
    assert group.tuning.warnings == ("weight_decay=0.1 is the largest tried",)


def test_a_run_that_failed_before_it_had_a_config_is_of_the_only_value(write, tmp_path):
    folder = trials(write, tmp_path / "t", "kan", {1e-3: {0: (0.8, 0.8)}})
    (folder / "broken").mkdir()
    (folder / "broken" / "run.json").write_text(json.dumps({"status": "failed", "layer": "kan", "task": "digits"}))
    group = tuning(folder)
    assert len(group.runs) == 2
    assert group.tuning.warnings == ("only lr=0.001 was tried", "lr=0.001 failed in seed none")


def test_a_key_that_no_run_says_is_tuned_makes_contestants_as_ever(write, tmp_path):
    folder = trials(write, tmp_path / "t", "kan", {1e-3: {0: (0.8, 0.8)}, 3e-3: {0: (0.9, 0.9)}}, tune=())
    assert [group.label for group in load_comparison(folder).groups] == ["kan (lr=0.001)", "kan (lr=0.003)"]
    assert all(group.tuning is None for group in load_comparison(folder).groups)
    assert report_sections(load_comparison(folder))[0].tuned is None


@pytest.fixture
def tuned(write, tmp_path):
    values = {1e-3: {0: (0.8, 0.8)}, 3e-3: {0: (0.9, 0.9), 1: (0.8, 0.7)}, 1e-2: {0: "diverged"}}
    folder = trials(write, tmp_path / "digits", "kan", values)
    return trials(write, folder, "linear", {1e-3: {0: (0.5, 0.5), 1: (0.4, 0.6)}, 3e-3: {0: (0.4, 0.9)}})


def test_every_format_lists_what_was_tried(tuned):
    page = write_report(tuned).read_text()
    assert ">Tuned</h2>" in page
    assert "Tuning of linear: lr=0.001 is the smallest tried." in page
    markdown = (tuned / "report.md").read_text()
    table = markdown.split("## Tuned\n\n")[1].split("\n\n")[0].splitlines()
    assert table[0] == "| Contestant | Tried | Validation accuracy % | Seeds | Choice |"
    assert table[2:] == [
        "| kan | lr=0.001 | 80.00 | 1 | – |",
        "| kan | lr=0.003 | 90.00 | 2 (1 compared) | chosen (lr=0.01 diverged in seed 0) |",
        "| kan | lr=0.01 | – | 0 | lost (diverged in seed 0) |",
        "| linear | lr=0.001 | 50.00 | 2 (1 compared) | chosen (lr=0.001 is the smallest tried) |",
        "| linear | lr=0.003 | 40.00 | 1 | – |",
    ]
    runs = markdown.split("## Runs\n\n")[1]
    assert len(runs.strip().splitlines()) == 2 + 7
    assert "| kan: lr=0.01 | 0 | – |" in runs
    rows = {row["label"]: row for row in csv.DictReader(io.StringIO((tuned / "report.csv").read_text()))}
    assert rows["kan"]["tuned"] == "lr=0.003"
    assert rows["kan"]["tuned_of"] == "lr=0.001; lr=0.003; lr=0.01"
    assert rows["kan"]["tuned_validation"] == "0.9"
    assert r"\label{tab:digits-digits-tuned}" in (tuned / "report.tex").read_text()


def test_the_console_names_what_was_chosen_and_what_to_mind(tuned):
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(console_table(load_comparison(tuned)))
    text = " ".join(console.export_text().split())
    assert "kan: lr=0.003, the best of 3 by validation score." in text
    assert "Tuning of kan: lr=0.01 diverged in seed 0." in text


def test_many_doubtful_contestants_are_counted(write, tmp_path):
    folder = tmp_path / "t"
    for layer in ("kan", "phm", "aptx", "paon", "linear"):
        trials(write, folder, layer, {1e-3: {0: (0.8, 0.8)}})
    (section,) = report_sections(load_comparison(folder))
    told = [line for line in section.verdict.caveats if line.startswith("Tuning")]
    assert told == ["Tuning: there is something to mind for 5 of 5 contestants; the table Tuned says."]


def test_a_record_has_what_was_tried_and_its_table_says_what_was_chosen(tuned):
    record = json.loads(json.dumps(comparison_record(tuned, "x")))
    kan = next(row for row in record["rows"] if row["label"] == "kan")
    assert kan["seeds"] == [0, 1]
    assert [(trial["name"], trial["validation"], trial["chosen"]) for trial in kan["tuned"]["trials"]] == [
        ("lr=0.001", 0.8, False),
        ("lr=0.003", 0.9, True),
        ("lr=0.01", None, False),
    ]
    table = readme.comparison_table(record)
    assert "`kan` lr=0.003 of 0.001, 0.003, 0.01 (lr=0.01 diverged in seed 0)" in table
    assert "`linear` lr=0.001 of 0.001, 0.003 (lr=0.001 is the smallest tried)" in table


def test_a_record_of_several_tasks_says_that_each_was_tuned(write, tuned):
    trials(write, tuned, "phm", {1e-3: {0: (0.8, 0.8)}}, task="wine")
    table = readme.comparison_table(comparison_record(tuned, "x"))
    assert "Tuned by the validation score, task by task: lr (3 of 3 choices have a warning in the report)." in table


def test_comparisons_of_tuned_runs_are_set_side_by_side(write, tuned, tmp_path):
    other = trials(write, tmp_path / "other", "kan", {1e-3: {0: (0.9, 0.5), 1: (0.9, 0.4)}, 3e-3: {0: (0.1, 0.9)}})
    compare_reports(tuned, other)
    assert re.search(r"\| kan \|.*\| 45\.00 ", (other / "compare.md").read_text())
