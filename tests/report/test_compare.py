import pytest

from archzoo.report import compare, compare_reports, load_comparison

BEFORE = {"linear": [0.90 + 0.002 * i for i in range(6)], "kan": [0.93, 0.94], "old": [0.5]}
AFTER = {"linear": [0.95 + 0.003 * i for i in range(6)], "kan": [0.935, 0.94], "new": [0.6]}


def both(build):
    return build(BEFORE, name="before"), build(AFTER, name="after", step_time=0.0024)


def test_contestants_are_matched_by_label_and_paired_by_seed(build):
    changes = {change.label: change for change in compare(*map(load_comparison, both(build)))}
    assert list(changes) == ["linear", "kan", "new", "old"]
    linear, kan = changes["linear"], changes["kan"]
    assert linear.difference is not None
    assert linear.difference.mean == pytest.approx(0.0525)
    assert linear.paired
    # two comparisons are tested: 1/32 becomes 1/16
    assert linear.p_holm == pytest.approx(1 / 16)
    assert (linear.tie, kan.tie, changes["new"].tie) == (True, True, None)
    assert changes["new"].a is None
    assert changes["old"].b is None


def test_a_change_that_the_seeds_separate_is_one(build, capsys):
    one = build({"linear": BEFORE["linear"]}, name="a")
    two = build({"linear": AFTER["linear"]}, name="b")
    compare_reports(one, two)
    assert "Better in b: linear." in capsys.readouterr().out
    compare_reports(two, one)
    assert "Worse in a: linear." in capsys.readouterr().out


def test_without_common_seeds_the_change_is_unpaired_and_untested(build, write):
    one = build({"linear": [0.90, 0.91]}, name="a")
    two = build({"linear": []}, name="b")
    for seed in (7, 8):
        write(two / f"l{seed}", seed=seed, score=0.95)
    (change,) = compare(load_comparison(one), load_comparison(two))
    assert (change.paired, change.p_holm, change.tie) == (False, None, True)
    assert change.difference is not None
    assert change.difference.low is not None


def test_scores_that_measure_different_things_are_not_compared(build):
    one = build({"linear": [0.9]}, name="a")
    two = build({"linear": [0.9]}, name="b", metric="mse", mode="min")
    (change,) = compare(load_comparison(one), load_comparison(two))
    assert (change.comparable, change.difference) == (False, None)
    assert "not compared" in compare_reports(one, two).read_text()


def test_it_is_printed_and_written_into_the_second_folder(build, capsys):
    one, two = both(build)
    path = compare_reports(one, two)
    assert path == two / "compare.html"
    out = capsys.readouterr().out
    assert "2.00x" in out
    assert max(map(len, out.splitlines())) <= 100
    page, markdown = path.read_text(), (two / "compare.md").read_text()
    for text in (page, markdown, out):
        assert "new only in after" in " ".join(text.split())
    assert "<script" not in page
    assert not (one / "compare.html").exists()
    first = path.read_bytes()
    compare_reports(one, two)
    assert path.read_bytes() == first


def test_settings_that_differ_are_listed(build):
    one = build({"linear": [0.9]}, name="a", steps=400)
    two = build({"linear": [0.9]}, name="b", steps=800, change={"git": {"commit": "fedcba", "dirty": True}})
    compare_reports(one, two)
    text = (two / "compare.md").read_text()
    assert "| trainer.steps | 400 | 800 |" in text
    assert "fedcba with uncommitted changes" in text


def test_a_folder_without_runs_is_refused(build, tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        compare_reports(build({"linear": [0.9]}), tmp_path / "nowhere")


def test_two_functions_of_one_task_are_not_compared(build):
    one, two, three = (
        build({"linear": [score]}, name=name, task="functions", task_options={"function": function})
        for name, function, score in (("a", "xy", 0.9), ("b", "j0", 0.8), ("c", "xy", 0.7))
    )
    changes = compare(load_comparison(one), load_comparison(two))
    assert [(change.task, change.difference) for change in changes] == [("j0", None), ("xy", None)]
    (change,) = compare(load_comparison(one), load_comparison(three))
    assert change.difference is not None
    assert "no contestant has a score in both" in compare_reports(one, two).read_text().lower()
