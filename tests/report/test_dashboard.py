import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from archzoo.__main__ import main
from archzoo.report.dashboard import build_dashboard, specs
from archzoo.report.load import load_comparison
from archzoo.report.sections import report_overview, report_sections
from archzoo.training import dashboards
from benchmarks._wandb_server import KEY, WandbServer


def built(folder, baseline=None):
    comparison = load_comparison(folder)
    sections = report_sections(comparison, baseline)
    dashboard = build_dashboard(comparison, sections, report_overview(comparison, sections), "zoo", "archzoo")
    return specs(dashboard), sections


def panels_of(spec):
    return [p for s in spec["section"]["panelBankConfig"]["sections"] for p in s["panels"]]


def blocks_of(told, kind):
    return [block for block in told["report"]["spec"]["blocks"] if block["type"] == kind]


@pytest.fixture
def digits(build, write):
    """Two layers, three seeds; a run that failed, one that drew and wrote something, and one that is running."""
    folder = build({"linear": [0.90, 0.91, 0.92], "kan": [0.93, 0.95, None]})
    write(folder / "kan-9", layer="kan", seed=9, status="running", score=None)
    run = folder / "kan-0"
    (run / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(run / "pictures" / "weights.png")
    record = json.loads((run / "run.json").read_text())
    record |= {"steps": 400, "pictures": {"drawn": [{"name": "weights", "caption": "all of them"}], "failed": []}}
    (run / "run.json").write_text(json.dumps(record))
    (run / "samples.jsonl").write_text('{"step": 10, "sample": "ROMEO:"}\n')
    return folder


def test_workspace_and_report_show_the_runs_grouped_by_layer(digits):
    told, (section,) = built(digits)
    workspace = told["workspace"]["spec"]["section"]
    (runset,) = workspace["runSets"]
    assert runset["grouping"] == [{"section": "config", "name": "contestant.value"}]
    assert runset["sort"]["keys"] == [{"key": {"section": "summary", "name": "score"}, "ascending": False}]
    for name in (*(f"{layer}-{seed}" for layer in ("kan", "linear") for seed in (0, 1, 2)), "kan-9"):
        assert f'"{name}"' in json.dumps(runset["filters"])
    by_kind: dict[str, list[dict]] = {}
    for panel in panels_of(told["workspace"]["spec"]):
        by_kind.setdefault(panel["viewType"], []).append(panel["config"])
    curves = [(line["metrics"], line.get("xAxis")) for line in by_kind["Run History Line Plot"]]
    assert (["val/accuracy"], "_step") in curves
    assert (["val/accuracy"], "train_s") in curves
    assert (["train/loss"], "_step") in curves
    assert all(
        (line["groupAgg"], line["groupArea"], line["aggregate"]) == ("mean", "minmax", True)
        for line in by_kind["Run History Line Plot"]
    )
    assert [plot["xAxis"] for plot in by_kind["Scatter Plot"]] == [
        "summary:parameters",
        "summary:flops",
        "summary:timing/step_time_p50_s",
        "summary:memory/saved_for_backward_bytes",
        "summary:memory/peak_rss_bytes",
    ]
    assert {plot["yAxis"] for plot in by_kind["Scatter Plot"]} == {"summary:score"}
    assert [media["mediaKeys"] for media in by_kind["Media Browser"]] == [["pictures/weights"], ["sample"]]
    (table,) = by_kind["Markdown Panel"]
    assert section.verdict.caveats
    for text in (section.verdict.sentence, *section.verdict.caveats, "95 % CI", section.ranking.rows[0][2].detail):
        assert text in table["value"]
    # The report has the same panels, with a runset of its own.
    grids = blocks_of(told, "panel-grid")
    shown = [panel["viewType"] for grid in grids for panel in grid["metadata"]["panelBankSectionConfig"]["panels"]]
    assert sorted(shown) == sorted(kind for kind, found in by_kind.items() for _ in found if kind != "Markdown Panel")
    assert all(grid["metadata"]["runSets"][0]["grouping"] == runset["grouping"] for grid in grids)
    assert section.verdict.sentence in json.dumps(told["report"], ensure_ascii=False)
    headings = [block["children"][0]["text"] for block in blocks_of(told, "heading")]
    assert headings == [
        *("Ranking", "Learning curves", "Score against cost", "Samples and pictures"),
        *("Cost", "Setting", "How it was computed"),
    ]


def test_figures_have_the_names_that_runs_log(tmp_path):
    from archzoo.report.dashboard import COSTS
    from archzoo.training.trackers import flat_summary

    record = {
        "status": "done",
        "parameters": 1,
        "flops": 1,
        "timing": {"step_time_p50_s": 1.0},
        "memory": {"saved_for_backward_bytes": 1, "peak_rss_bytes": 1, "peak_cuda_bytes": 1},
        "summary": {},
        "score": {"value": 1.0},
    }
    assert {*COSTS, "score", "status"} == set(flat_summary(record))


def test_options_and_tasks_are_grouped_by_their_config_keys(build_sizes):
    folder = build_sizes(
        {"kan": lambda p, late: 1 / p + late * 1e-4, "linear": lambda p, late: 2 / p + late * 1e-4},
        functions=("xy", "exp_sin"),
    )
    told, sections = built(folder)
    workspace = told["workspace"]["spec"]["section"]
    names = [key["name"] for key in workspace["runSets"][0]["grouping"]]
    assert names == ["task.value.function", "contestant.value", "budget.value.to"]
    assert workspace["runSets"][0]["sort"]["keys"][0]["ascending"] is True
    headings = [block["children"][0]["text"] for block in blocks_of(told, "heading")]
    assert [text for text in headings if text.startswith(("Task", "All"))] == ["All tasks", "Task exp_sin", "Task xy"]
    grids = blocks_of(told, "panel-grid")
    for section, grid in zip(sections, (grids[0], grids[-1]), strict=True):
        ids = json.dumps(grid["metadata"]["runSets"][0]["filters"])
        assert all((f'"{run.id}"' in ids) == (run.task == section.task) for s in sections for run in s.comparison.runs)


def test_dry_run_needs_no_login_sends_nothing_and_takes_hostile_names(build, capsys, monkeypatch):
    monkeypatch.setattr(dashboards, "log_in", lambda: pytest.fail("a dry run asks nobody"))
    folder = build({"linear": [0.9, 0.91], "<b>|`kan` 🙂": [0.93, 0.95]}, name="di=g+its 🙂 <b>")
    assert main(["dashboard", str(folder), "--project", "mine", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "would send 2 runs to ENTITY/mine: 0 recorded offline, 2 told from the local record" in out
    assert "2 are running or unreadable" in out  # an id is no way into a filter, or out of a folder
    told = json.loads((folder / "dashboard-preview.json").read_text())
    assert f"report: {len(told['report']['spec']['blocks'])} blocks" in out
    assert told["workspace"]["name"] == "digits  b: which layer won"
    assert "\\\\<b>" in json.dumps(told["workspace"])


def test_without_a_login_it_says_so_and_writes_the_local_report(digits, capsys, monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert main(["dashboard", str(digits)]) == 1
    told = capsys.readouterr()
    why = "there is no login for http://127.0.0.1:9; run `wandb login`, or set WANDB_API_KEY"
    assert told.err == f"W&B does not have all of it: {why}\n"
    assert told.out == f"local report: {digits / 'report.html'}\n"
    assert (digits / "report.html").is_file()
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert main(["dashboard", str(digits)]) == 1
    assert "http://127.0.0.1:9 does not answer as W&B does (ConnectionError)" in capsys.readouterr().err
    with WandbServer("bad key") as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        assert main(["dashboard", str(digits)]) == 1
    assert "does not accept the API key" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", None)
    assert main(["dashboard", str(digits), "--dry-run"]) == 1
    assert "pip install 'archzoo[dashboards]'" in capsys.readouterr().err


def test_a_wrong_folder_is_an_error(tmp_path, capsys):
    assert main(["dashboard", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err


@pytest.mark.slow
def test_a_server_is_sent_runs_workspace_and_report_once(digits, tmp_path):
    """Against a loopback server; in processes of their own, as wandb reads its settings once a process."""
    with WandbServer() as server:
        environment = {**os.environ, **server.environment}

        def call(*options):
            command = [sys.executable, "-m", "archzoo", "dashboard", str(digits), *options]
            done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
            assert (done.returncode, done.stderr) == (0, "")
            return done.stdout

        out = call()
        assert "runs on W&B: 6 of 7" in out
        assert set(server.lines) == {"kan-0", "kan-1", "kan-2", "linear-0", "linear-1", "linear-2"}
        for run, lines in server.lines.items():
            steps = {json.loads(line)["step"] for line in _whole(digits / run / "metrics.jsonl")}
            assert {line["_step"] for line in lines} == steps
        expected, _ = built(digits)
        workspace, report = server.views["project-view"], server.views["runs"]
        assert without_ids(json.loads(workspace["spec"])) == without_ids(expected["workspace"]["spec"])
        assert without_ids(json.loads(report["spec"])) == without_ids(expected["report"]["spec"])
        assert (workspace.get("id"), report.get("id")) == (None, None)
        config = json.loads(server.runs["kan-0"]["config"])
        assert config["contestant"]["value"] == "kan"
        assert {Path(name).suffix for name in server.files} >= {".html", ".png"}
        sent = len(server.lines["kan-0"])

        call()  # again: no run twice, and the same workspace and report
        assert len(server.lines["kan-0"]) == sent
        assert server.views["project-view"]["id"] == "id-of-project-view"
        assert server.views["runs"]["id"] == "id-of-runs"
        assert server.views["project-view"]["name"] == workspace["name"]

        call("--project", "other")  # all of it once more, elsewhere
        assert server.views["runs"]["projectName"] == "other"
        assert server.views["runs"].get("id") is None
        assert {run["project"] for run in server.runs.values()} == {"other"}


def _whole(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line.endswith("}")]


def without_ids(spec):
    """A spec without the ids that are drawn at random."""
    if isinstance(spec, dict):
        return {key: without_ids(value) for key, value in spec.items() if key not in ("id", "__id__", "ref", "key")}
    return [without_ids(value) for value in spec] if isinstance(spec, list) else spec
