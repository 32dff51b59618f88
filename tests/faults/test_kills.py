"""Row "kill -9 at any moment" of the reliability table: nothing is lost, nothing is unreadable, the end is the same."""

import pytest

from tests.faults.kills import kill_runs


@pytest.mark.parametrize("kills", [3, pytest.param(40, marks=pytest.mark.slow)])
def test_kill_9_at_any_moment_loses_nothing(tmp_path, kills):
    counts = kill_runs(tmp_path, kills)
    assert counts["kills"] == kills
    assert counts["inside_a_save"] >= kills // 8
    assert (counts["lost"], counts["unreadable"], counts["left_behind"]) == (0, 0, 0)
