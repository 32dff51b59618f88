import json

import pytest

from archzoo.report import load_comparison, rank
from archzoo.report.formatting import Scale
from archzoo.report.methods import methods
from archzoo.report.ranking import default_baseline
from archzoo.report.stats import wilson
from archzoo.report.verdict import verdict

SEPARABLE = {"linear": [0.90 + 0.001 * i for i in range(8)], "kan": [0.95 + 0.002 * i for i in range(8)]}


def judge(folder, baseline="linear"):
    comparison = load_comparison(folder)
    rows = rank(comparison, baseline)
    scale = Scale.of(comparison.metric, [value for row in rows for value in row.values])
    return rows, verdict(comparison, rows, scale)


def by_label(folder, baseline="linear"):
    return {row.label: row for row in rank(load_comparison(folder), baseline)}


def test_the_better_mean_comes_first_in_both_modes(build):
    scores = {"linear": [0.5, 0.6], "kan": [0.7, 0.8], "phm": [0.1, 0.2]}
    assert [row.label for row in rank(load_comparison(build(scores, name="a")))] == ["kan", "linear", "phm"]
    low = build(scores, name="b", metric="mse", mode="min")
    rows = rank(load_comparison(low))
    assert [(row.rank, row.label) for row in rows] == [(1, "phm"), (2, "linear"), (3, "kan")]
    assert rows[0].difference is not None
    assert rows[0].difference.mean == pytest.approx(-0.4)


def test_a_clear_lead_is_a_win(build):
    rows, said = judge(build(SEPARABLE))
    assert (rows[0].tie, rows[0].leader, rows[1].ties_leader) == (False, True, False)
    assert said.sentence == "kan beats linear by 5.35 points."
    assert rows[0].p_holm == pytest.approx(2 / 2**8)


def test_a_lead_of_three_seeds_is_never_a_win_and_says_how_many_it_takes(build):
    rows, said = judge(build({"linear": [0.900, 0.901, 0.902], "kan": [0.950, 0.951, 0.952]}))
    assert rows[0].tie is True
    assert rows[0].p_value == pytest.approx(0.25)
    assert said.sentence == "kan leads by 5.00 points, not separable from linear with 3 seeds."
    assert "6 common seeds are needed to reach 0.05" in " ".join(said.details)
    assert "is 0.25" in " ".join(said.details)
    assert "beats" not in " ".join([said.sentence, *said.details])


def test_holm_makes_a_tie_of_what_one_comparison_would_separate(build):
    one = {"linear": [0.9 + 0.001 * i for i in range(6)], "kan": [0.95 + 0.002 * i for i in range(6)]}
    assert by_label(build(one, name="one"))["kan"].tie is False
    three = {**one, "phm": [0.94 + 0.002 * i for i in range(6)], "paon": [0.93 + 0.002 * i for i in range(6)]}
    row = by_label(build(three, name="three"))["kan"]
    assert row.tie is True
    assert row.p_value == pytest.approx(1 / 32)
    assert row.p_holm == pytest.approx(3 / 32)
    comparison = load_comparison(build(three, name="again"))
    assert "Holm-corrected over the 3 comparisons" in " ".join(methods(comparison, rank(comparison)))


def test_a_tie_with_the_leader_is_marked_though_both_beat_the_baseline(build):
    close = [value + (-1) ** i * 0.0005 for i, value in enumerate(SEPARABLE["kan"])]
    rows, said = judge(build({**SEPARABLE, "phm": close}))
    assert [row.tie for row in rows] == [False, False, None]
    assert [row.ties_leader for row in rows] == [False, True, False]
    assert "beats linear" in said.sentence
    assert f"not separable from {rows[1].label}." in " ".join(said.details)


def test_a_leading_baseline_is_said_to_be_the_baseline(build):
    _, said = judge(build({"linear": SEPARABLE["kan"], "kan": SEPARABLE["linear"]}, name="a"))
    assert said.sentence == "linear (the baseline) beats kan, the best of the others, by 5.35 points."
    _, said = judge(build({"linear": [0.9, 0.8], "kan": [0.8, 0.85]}, name="b"))
    assert said.sentence == "linear (the baseline) leads by 2.50 points, not separable from kan with 2 seeds."


def test_differences_are_paired_over_common_seeds_only(build):
    rows, said = judge(build({"linear": [None, 0.90, 0.90, 0.90], "kan": [1.0, 0.89, 0.89]}))
    kan = next(row for row in rows if row.label == "kan")
    assert kan.leader
    assert kan.common_seeds == 2
    assert kan.difference is not None
    assert kan.difference.mean == pytest.approx(-0.01)
    assert "2 seeds in common with linear" in kan.notes
    assert said.sentence == (
        "kan has the best mean, but over the 2 seeds in common it is not separable from linear, 1.00 points ahead."
    )


def test_a_mean_over_luckier_seeds_is_no_win(build, write):
    common = [0.90 + 0.001 * i for i in range(8)]
    worse = {"linear": common, "kan": [value - 0.01 - 0.001 * i for i, value in enumerate(common)]}
    folder = build(worse)
    for seed in range(8, 16):
        write(folder / f"k{seed}", layer="kan", seed=seed, score=0.99)
    rows, said = judge(folder)
    assert [row.label for row in rows] == ["kan", "linear"]
    assert rows[1].ties_leader
    assert "beaten by linear" in said.sentence
    rows, said = judge(folder, None)
    assert rows[1].ties_leader
    assert "not separable" in said.sentence


def test_without_a_common_seed_nothing_is_tested(build):
    rows, said = judge(build({"linear": [0.8, None], "kan": [None, 0.9]}))
    assert rows[0].difference is None
    assert rows[0].tie is True
    assert "no seed in common" in said.sentence


def test_one_seed_has_no_interval(build):
    rows, said = judge(build({"linear": [0.8], "kan": [0.9]}))
    assert rows[0].score is not None
    assert rows[0].score.low is None
    assert rows[0].p_value is None
    assert said.sentence == "kan leads by 10.00 points, not separable from linear with 1 seed."


def test_zero_variance_is_noted(build):
    rows, _ = judge(build({"linear": [0.9] * 3, "kan": [0.9] * 3}))
    assert all("all seeds gave the same score" in " ".join(row.notes) for row in rows)
    assert all(row.p_value in (None, 1.0) for row in rows)


def test_equal_means_are_called_equal(build):
    _, said = judge(build({"linear": [0.9, 0.8], "kan": [0.8, 0.9]}))
    assert "have the same mean" in said.sentence


def test_a_single_contestant_wins_nothing(build):
    rows, said = judge(build({"kan": [0.9, 0.8]}))
    assert said.sentence == "kan has nothing to be compared with."
    assert rows[0].tie is None


def test_nobody_with_a_score_is_no_winner(build):
    rows, said = judge(build({"kan": [None], "linear": [None, None]}))
    assert said.sentence == "No winner: none of 3 runs has a score yet (3 failed)."
    assert all(row.rank is None for row in rows)


def test_without_a_baseline_the_leader_is_tested_against_the_second(build):
    folder = build({"kan": SEPARABLE["kan"], "phm": SEPARABLE["linear"]})
    rows, said = judge(folder)
    assert rows[1].difference is None
    assert said.sentence == "kan beats phm, the second, by 5.35 points."
    assert default_baseline(load_comparison(folder)) is None
    folder = build({"kan": [0.9, 0.8], "phm": [0.85, 0.7]}, name="few")
    assert judge(folder)[1].sentence == "kan leads by 7.50 points, not separable from phm with 2 seeds."


def test_contestants_with_only_failures_are_at_the_bottom_with_their_error(build, write):
    folder = build({"linear": [0.1], "kan": [None, None]})
    write(
        folder / "d",
        layer="phm",
        status="diverged",
        score=0.99,
        diverged={"step": 120, "module": "layers.1", "what": "output"},
    )
    write(folder / "r", layer="nau", status="running", score=None)
    write(folder / "i", layer="nmu", status="interrupted", score=None)
    rows = rank(load_comparison(folder))
    assert [row.label for row in rows] == ["linear", "kan", "nau", "nmu", "phm"]
    notes = {row.label: " ".join(row.notes) for row in rows}
    assert notes["kan"] == "2 x failed: ValueError: no"
    assert notes["phm"] == "diverged at step 120 in layers.1 (output)"
    assert rows[1].statuses == {"failed": 2}


def test_survivors_and_unfinished_runs_are_caveats(build, write):
    folder = build({"linear": [0.9, 0.8], "kan": [0.95, None]})
    write(folder / "r", layer="kan", seed=2, status="running", score=None)
    _, said = judge(folder)
    told = " ".join(said.caveats)
    assert "Mean over the surviving seeds only: kan." in told
    assert "Provisional: 1 run of 5 is not finished." in told


def test_a_missed_budget_is_said(build):
    rows, said = judge(build({"linear": [0.9], "kan": [0.95]}, deviation={"kan": 0.023, "linear": 0.0}))
    assert {row.label: str(row.budget) for row in rows} == {"kan": "nearest reachable: +2.3 %", "linear": "0.0 %"}
    assert "kan (nearest reachable: +2.3 %)" in " ".join(said.caveats)


def test_a_budget_within_tolerance_is_a_percentage(build):
    assert str(by_label(build({"kan": [0.9]}))["kan"].budget) == "-0.1 %"


def test_cost_is_said_in_multiples_of_the_baseline(build):
    folder = build(
        {"linear": [0.9], "kan": [0.95]}, step_time={"kan": 0.003, "linear": 0.001}, flops={"kan": 20, "linear": 10}
    )
    _, said = judge(folder)
    assert "kan takes 3.00 x the step time (3.00 ms against 1.00 ms)" in " ".join(said.details)
    assert "2.00 x the FLOPs" in " ".join(said.details)


def test_the_best_of_several_baselines_is_taken(build, write):
    folder = build({"kan": [0.9]})
    for lr, score in ((0.1, 0.8), (0.01, 0.85)):
        config = {"layer": {"name": "linear"}, "optimizer": {"lr": lr}, "seed": 0}
        write(folder / f"l{lr}", score=score, change={"config": config})
    rows = by_label(folder)
    assert rows["linear (lr=0.01)"].baseline
    assert not rows["linear (lr=0.1)"].baseline
    assert by_label(folder, "linear (lr=0.1)")["linear (lr=0.1)"].baseline


def test_an_unknown_baseline_is_refused_with_a_suggestion(build):
    comparison = load_comparison(build({"kan": [0.9], "fast_kan": [0.8]}))
    with pytest.raises(ValueError, match=r"'fast_can'.*did you mean 'fast_kan'"):
        rank(comparison, "fast_can")
    assert [row.baseline for row in rank(comparison, None)] == [False, False]


def test_task_figures_are_rates_and_medians(build, write):
    folder = build({"linear": [0.1]}, metric="mse", mode="min")
    for seed, (status, summary) in enumerate(
        [
            ("done", {"success": 1.0, "solved_at": 1000}),
            ("done", {"success": True, "solved_at": 3000}),
            ("done", {"success": 0.0, "solved_at": None}),
            ("diverged", {}),
            ("running", {"success": 1.0}),
        ]
    ):
        write(
            folder / f"n{seed}", layer="nmu", seed=seed, status=status, metric="mse", mode="min", task_summary=summary
        )
    figures = by_label(folder)["nmu"].figures
    assert (figures["success"].successes, figures["success"].count) == (2, 4)
    assert (figures["solved_at"].value, figures["solved_at"].count) == (2000, 2)
    assert by_label(folder)["linear"].figures == {}


def test_seeds_within_a_run_count_each(build, write):
    folder = build({"linear": [0.1]}, metric="mse", mode="min")
    for seed, succeeded in ((0, 15), (20, 4)):
        summary = {"success": succeeded / 20, "success_low": 0.0, "success_high": 1.0, "successes": succeeded}
        summary |= {"seeds": 20, "solved_at": 1000.0 + seed, "solved_at_low": 1.0, "each_success": [1] * 20}
        write(folder / f"n{seed}", layer="nmu", seed=seed, metric="mse", mode="min", task_summary=summary)
    figures = by_label(folder)["nmu"].figures
    assert figures.keys() == {"success", "solved_at"}
    success = figures["success"]
    assert (success.successes, success.count, success.value) == (19, 40, 0.475)
    assert (success.low, success.high) == wilson(19, 40)
    assert figures["solved_at"].value == 1010


def test_tasks_are_ranked_each_for_itself(build, write):
    folder = build({"linear": [0.9], "kan": [0.8]})
    write(folder / "a", layer="linear", task="wine", score=0.1)
    write(folder / "b", layer="kan", task="wine", score=0.2)
    assert [(row.task, row.label, row.rank) for row in rank(load_comparison(folder))] == [
        ("digits", "linear", 1),
        ("digits", "kan", 2),
        ("wine", "kan", 1),
        ("wine", "linear", 2),
    ]


def test_memory_is_of_one_kind_for_all(build):
    rows = by_label(build({"linear": [0.9], "kan": [0.8]}))
    assert {row.memory_kind for row in rows.values()} == {"kept for backward"}
    gpu = {"saved_for_backward_bytes": None, "peak_rss_bytes": 5, "peak_cuda_bytes": 7}
    rows = by_label(build({"linear": [0.9], "kan": [0.8]}, name="gpu", change={"memory": gpu}))
    assert {(row.memory_kind, row.memory_bytes) for row in rows.values()} == {("peak GPU memory", 7)}


def test_step_times_of_different_machines_are_warned_of(build, write):
    folder = build({"linear": [0.9]})
    write(folder / "k", layer="kan", change={"machine": {"host": "other", "cpu": "x", "cores": 9}, "threads": 4})
    told = " ".join(judge(folder)[1].caveats)
    assert "2 machines" in told
    assert "2 thread counts" in told


def test_the_default_baseline_is_linear_or_what_the_budget_was_matched_to(build):
    assert default_baseline(load_comparison(build({"linear": [1], "kan": [1]}, name="a"))) == "linear"
    budget = {"match": "params", "to": "phm", "target": 10, "reached": 10, "deviation": 0}
    folder = build({"phm": [0.5], "kan": [0.5]}, name="b", change={"budget": budget})
    assert default_baseline(load_comparison(folder)) == "phm"


@pytest.mark.parametrize(("named", "baseline"), [("kan", "kan"), ("nobody", "linear"), (None, "linear")])
def test_the_sweep_may_name_the_baseline(build, named, baseline):
    folder = build({"linear": [1], "kan": [1]})
    for path in folder.glob("*/run.json"):
        record = json.loads(path.read_text())
        record["config"]["sweep"] = {"baseline": named}
        path.write_text(json.dumps(record))
    assert default_baseline(load_comparison(folder)) == baseline
    said = any("baseline that was asked for, nobody," in caveat for caveat in judge(folder)[1].caveats)
    assert said == (named == "nobody")


@pytest.mark.parametrize(
    ("metric", "values", "value", "shown"),
    [
        ("accuracy", [0.5, 0.97], 0.9712, "97.12"),
        ("accuracy", [50.0, 97.0], 97.12, "97.12"),
        ("mse", [0.3, 0.2], 0.25, "0.2500"),
        ("mse", [1e-6, 0.3], 1.2345e-6, "1.234e-06"),
        ("perplexity", [123.4, 99.0], 123.45, "123.5"),
        ("mse", [0.0], 0.0, "0"),
    ],
)
def test_scores_are_written_to_suit_their_size(metric, values, value, shown):
    assert Scale.of(metric, values).value(value) == shown


def test_a_difference_that_rounds_to_nothing_has_no_minus():
    scale = Scale.of("accuracy", [0.5])
    assert scale.value(-1e-9, sign=True) == "+0.00"
    assert scale.value(-1e-9) == "0.00"


def test_run_json_is_all_that_is_read(build):
    folder = build({"linear": [0.9]})
    (folder / "linear-0" / "config.yaml").write_text("!!python/object/apply:os.system [false]")
    assert json.dumps(rank(load_comparison(folder))[0].values) == "[0.9]"
