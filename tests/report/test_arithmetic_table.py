"""What `python -m benchmarks arithmetic_table` makes of runs of the arithmetic experiments."""

import json

import pytest

from archzoo.report.stats import wilson
from benchmarks import arithmetic_table
from benchmarks.arithmetic_table import arithmetic_record, main, table, unit_name

TASK = {"operation": "function10", "input_size": 100, "train_range": [1.0, 2.0], "test_range": [2.0, 6.0]}


def stacked(succeeded, of, first=1000.0):
    """The summary of a run of several seeds."""
    return {
        "success": succeeded / of,
        "each_success": [1] * succeeded + [0] * (of - succeeded),
        "each_solved_at": [first + 1000 * i for i in range(succeeded)] + [None] * (of - succeeded),
        "each_sparsity_error": [1e-5] * succeeded + [0.5] * (of - succeeded),
    }


def formula_run(write, folder, layer, summary, *, seed=0, status="done", options=None, **task):
    write(
        folder,
        layer=layer,
        seed=seed,
        status=status,
        metric="mse",
        mode="min",
        task="arithmetic",
        task_options={**TASK, **task},
        task_summary=summary,
        options={"bias": False, **(options or {})},
    )


def sequence_run(write, folder, layer, seed, errors, accumulator="layer"):
    write(
        folder,
        layer=layer,
        seed=seed,
        metric="mse",
        mode="min",
        task="mnist_arithmetic",
        task_options={"operation": "sum"},
        model={"name": "sequence_arithmetic", "accumulator": accumulator},
        options={"bias": layer == "linear"},
    )
    record = json.loads((folder / "run.json").read_text())
    record["summary"]["test"] = {"mse": 1.0, "mse_at_10": errors[0], "mse_at_1000": errors[1]}
    (folder / "run.json").write_text(json.dumps(record))


def test_seeds_of_all_runs_of_a_unit_are_one_row(write, tmp_path):
    a, b = tmp_path / "arithmetic_function10", tmp_path / "more"
    formula_run(write, a / "0", "nmu", stacked(15, 20))
    formula_run(write, b / "1", "nmu", stacked(4, 20), seed=20)
    formula_run(write, b / "2", "nmu", {"success": 1.0, "solved_at": 1e5, "sparsity_error": 1e-5}, seed=40)
    formula_run(write, b / "3", "nmu", {}, seed=41, status="diverged")
    formula_run(write, b / "4", "nmu", {}, seed=42, status="failed")
    formula_run(write, b / "5", "nac", stacked(1, 20), options={"mode": "multiply"})
    record = json.loads(json.dumps(arithmetic_record([a, b])))
    nac, nmu = record["rows"]
    assert record["commands"] == [
        "python train.py experiment=arithmetic_function10",
        "python train.py experiment=more",
    ]
    assert record["unfinished"] == 1
    assert (nmu["operation"], nmu["inputs"], nmu["unit"]) == ("function10", 4, "nmu")
    assert (nmu["successes"], nmu["seeds"]) == (20, 42)
    assert (nmu["success_low"], nmu["success_high"]) == pytest.approx(wilson(20, 42))
    assert nmu["solved_at"] == 6500  # of 1000 to 15000, 1000 to 4000, and 1e5
    assert nmu["sparsity_error"] == 1e-5
    assert nmu["paper"] == {"success": 0.94, "solved_at": 1.4e4}
    assert nac["unit"] == "nac (mode=multiply)"
    assert "solved_at_low" not in nac
    lines = table(record).splitlines()
    assert lines[2].startswith("| `function10` | 4 | `nac (mode=multiply)` | 400 | 1 of 20 | 1 to 24 % | 13 % | 1e3 |")
    assert lines[3].startswith("| `function10` | 4 | `nmu` | 400 | 20 of 42 | 33 to 62 % | 94 % | 6.5e3 (")
    assert "commit 1f3a9c0b2d" in lines[-1]


def test_another_range_is_another_row_and_has_no_paper(write, tmp_path):
    formula_run(write, tmp_path / "0", "nmu", stacked(15, 20), operation="mul")
    formula_run(write, tmp_path / "1", "nmu", stacked(10, 20), operation="mul", train_range=[-2, -1])
    first, second = arithmetic_record([tmp_path])["rows"]
    assert {first["successes"], second["successes"]} == {15, 10}
    other, standard = sorted((first, second), key=lambda row: row["successes"])
    assert other["paper"] is None
    assert standard["paper"]["success"] == 0.98
    assert "`mul` [-2, -1]" in table(arithmetic_record([tmp_path]))


def test_sequences_are_judged_by_runs_of_the_exact_operation(write, tmp_path):
    for seed, error in enumerate((1.0, 2.0, 3.0)):  # mean 2, upper 99 % bound 2 + 6.96 / sqrt(3) = 6.02
        sequence_run(write, tmp_path / f"e{seed}", "linear", seed, (0.1, error), "sum")
    sequence_run(write, tmp_path / "a", "nau", 0, (0.1, 6.0))
    sequence_run(write, tmp_path / "b", "nau", 1, (0.1, 6.1))
    sequence_run(write, tmp_path / "c", "nac", 0, (0.1, None))
    record = arithmetic_record([tmp_path])
    rows = {row["unit"]: row for row in record["sequences"]}
    assert rows["nau"]["bound"] == pytest.approx(2 + 6.9646 / 3**0.5, rel=1e-4)
    assert (rows["nau"]["successes"], rows["nau"]["seeds"]) == (1, 2)
    assert rows["nac"]["successes"] == 0
    assert rows["exact"]["successes"] is None
    assert rows["nau"]["mse"] == {"10": 0.1, "1000": 6.05}
    text = table(record)
    assert "| sum of digits | steps | MSE at 10 | MSE at 1000 | as good as exact |" in text
    assert "| `nau` | 400 | 0.1 | 6 | 1 of 2 |" in text
    assert "| `nac` | 400 | 0.1 | not finite | 0 of 1 |" in text


def test_without_two_runs_to_judge_by_there_is_no_verdict(write, tmp_path):
    sequence_run(write, tmp_path / "e", "linear", 0, (0.1, 1.0), "sum")
    sequence_run(write, tmp_path / "a", "nau", 0, (0.1, 0.5))
    rows = {row["unit"]: row for row in arithmetic_record([tmp_path])["sequences"]}
    assert rows["nau"]["successes"] is None
    assert rows["nau"]["bound"] is None


def test_unit_is_named_with_what_is_not_the_default():
    assert unit_name({"name": "nmu", "bias": False, "noise": [1, 5], "init": "uniform"}) == "nmu (noise=[1, 5])"
    assert unit_name({"name": "nac", "mode": "add"}) == "nac"


def test_command_writes_the_record_and_refuses_a_folder_without_runs(write, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(arithmetic_table, "RESULTS", tmp_path / "results")
    formula_run(write, tmp_path / "outputs" / "0", "nmu", stacked(15, 20))
    main([str(tmp_path / "outputs"), "--command", "python train.py experiment=x"])
    record = json.loads((tmp_path / "results" / "arithmetic.json").read_text())
    assert record["commands"] == ["python train.py experiment=x"]
    assert "15 of 20" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no run of these tasks that is done"):
        main([str(tmp_path / "results")])
