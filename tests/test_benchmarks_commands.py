"""`python -m benchmarks gpu`, `cpu` and `peers`: plans, budgets, resumption, records and tables; what needs no GPU."""

import dataclasses
import json
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
import torch

from benchmarks import _speed, cpu, gpu, peers
from benchmarks._cases import H200
from benchmarks._measure import COMPILED, DEFINITION, OURS, OURS_COMPILED, Device
from benchmarks._ops import OPS
from tests.helpers import HEAVY, REPOSITORY, run_python, without
from tests.test_packaging import SITE_PACKAGES

RATIONAL = next(op for op in OPS if op.name == "rational")
RESIDUAL = next(op for op in OPS if op.name == "normalized_residual")
SMALL = [
    dataclasses.replace(op, gpu=(op.tiny, op.tiny | {"rows": 3}), cpu=(op.tiny,), peers=(), dtype=torch.float32)
    for op in (RATIONAL, RESIDUAL)
]
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens where there is no GPU")


def times(calls):
    for call in calls.values():
        call()
    return {name: dict.fromkeys(("least", "p20", "p50", "p80"), 1.0) for name in calls}


def device():
    return Device("gpu", "cpu", times, lambda call: (call(), 100)[1], lambda: 1e12)


def ceilings_module():
    pytest.importorskip("triton")
    from benchmarks import _ceilings

    return _ceilings


# --- Plans and budgets ------------------------------------------------------------------------------------------------


def test_every_op_is_measured_once_before_any_is_twice():
    tasks = gpu.plan(OPS)
    assert len({task.key for task in tasks}) == len(tasks)
    assert [task.op for task in tasks[: len(OPS)]] == list(OPS)
    assert all(task.part == "eager" and task.first for task in tasks[: len(OPS)])
    compiled = [task for task in tasks[len(OPS) :] if task.first]
    assert {task.part for task in compiled} == {"compiled"}
    assert tasks[len(OPS) : len(OPS) + len(compiled)] == compiled
    assert {task.op.name for task in tasks if not task.first} == {op.name for op in OPS if len(op.gpu) > 1}


def test_thresholds_are_measured_with_their_ops_those_without_a_case_before_second_sizes():
    keys = [task.key.split()[:2] for task in gpu.plan(SMALL, ["normalize", "normalized_residual", "rational"])]
    names = ["rational", "normalized_residual"]
    of_each = [[part, name] for name in names for part in ("threshold", "compiled")]
    both = [["eager", name] for name in names] + [["compiled", name] for name in names]
    assert keys == [*both[:2], *of_each, ["threshold", "normalize"], *both]


def test_what_the_time_does_not_reach_is_listed_and_the_next_run_goes_on(tmp_path, monkeypatch):
    tasks = [task for task in gpu.plan(SMALL) if task.part == "eager"]
    now = [100.0]
    monkeypatch.setattr(gpu.time, "time", lambda: now[0])

    def slow(calls):
        now[0] += 100.0
        return times(calls)

    log = gpu.Log(tmp_path / "cases.jsonl")
    said = []
    missed = gpu.work_off(tasks, log, dataclasses.replace(device(), race=slow), 400.0, said.append)
    assert missed == [task.key for task in tasks[2:]]
    assert [line.partition(" ")[0] for line in said] == ["rational", "normalized_residual"]
    again = gpu.Log(tmp_path / "cases.jsonl")
    assert gpu.work_off(tasks, again, device(), 1e9, said.append) == []
    assert len(said) == len(tasks)  # what was done is not done again
    rows = _speed.merged(gpu.Log(tmp_path / "cases.jsonl").rows())
    assert len(rows) == len(tasks)
    assert all(row["repeatable"] and row["floor"]["f_ms"] > 0 for row in rows)


def test_a_case_that_the_deadline_meets_is_put_off(tmp_path, monkeypatch):
    tasks = [task for task in gpu.plan(SMALL) if task.part == "eager"]

    def endless(*args, **options):
        with suppress(Exception):  # as a contestant's failure is
            time.sleep(60)

    log, began = gpu.Log(tmp_path / "cases.jsonl"), time.time()
    with monkeypatch.context() as patch:
        patch.setattr(gpu, "measure", endless)
        missed = gpu.work_off(tasks, log, device(), time.time() + 0.2, print)
    assert time.time() - began < 30
    assert missed == [task.key for task in tasks]
    assert [*log.lines[0], *log.lines[-1]] == ["began", "put off"]
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert gpu.work_off(tasks[:1], gpu.Log(log.path), device(), 1e12, print) == []
    assert "error" not in gpu.Log(log.path).rows()[0]


def test_a_compiled_part_that_fails_leaves_the_case_and_the_record_stands(tmp_path, monkeypatch):
    eager, compiled = gpu.plan(SMALL[:1])[:2]
    log = gpu.Log(tmp_path / "cases.jsonl")
    gpu.work_off([eager], log, device(), 1e12, print)
    monkeypatch.setattr(gpu, "measure", lambda *args, **options: 1 / 0)
    gpu.work_off([compiled, gpu.plan(SMALL)[1]], log, device(), 1e12, print)
    case, failed = gpu.record_of(log, SMALL, [], "command", 1.0)["rows"]
    assert case["contestants"][COMPILED] == {"error": "ZeroDivisionError: division by zero"}
    assert "f_ms" in case["contestants"][OURS]
    assert "error" not in case
    assert failed["error"] == "ZeroDivisionError: division by zero"


def test_a_threshold_is_measured_told_and_tried_once(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    tried = {8192: {"torch": 2e-3, "triton": 1e-3}, 4096: {"torch": 1e-3, "triton": 1.5e-3}}
    monkeypatch.setattr(gpu._thresholds, "measure", lambda op, place: (8192, tried) if op == "ssd" else 1 / 0)
    log, said = gpu.Log(tmp_path / "cases.jsonl"), []
    for _ in range(2):
        assert gpu.work_off([gpu.Threshold("ssd"), gpu.Threshold("rational")], log, device(), 1e12, said.append) == []
    assert said == [
        "threshold of ssd: 8192; ms by torch and Triton of numbers 4096: 1 and 1.5, 8192: 2 and 1",
        "threshold of rational: ZeroDivisionError: division by zero",
    ]
    assert [found.get("below") for found in log.thresholds()] == [8192, None]
    assert gpu.choose_thresholds(["rational", "basis_linear:cubic"]) == ["rational", "basis_linear:cubic"]
    assert len(gpu.choose_thresholds(["basis_linear"])) == 7


def test_a_fault_is_told_and_ends_neither_the_others_nor_the_next_process(tmp_path):
    tasks = [task for task in gpu.plan(SMALL) if task.part == "eager"]

    def fails(message):
        def race(calls):
            raise RuntimeError(message)

        return dataclasses.replace(device(), race=race)

    log = gpu.Log(tmp_path / "cases.jsonl")
    assert gpu.work_off(tasks[:1], log, fails("out of luck"), 1e12, print) == []
    assert log.rows()[0]["error"] == "RuntimeError: out of luck"
    with pytest.raises(RuntimeError, match="CUDA is lost"):
        gpu.work_off(tasks[1:2], log, fails("CUDA error: an illegal memory access was encountered"), 1e12, print)
    log.add({"began": tasks[2].key})  # and the process was killed
    with log.path.open("a") as file:
        file.write('{"done": "cut o')
    log = gpu.Log(log.path)
    assert gpu.work_off(tasks, log, device(), 1e12, print) == []
    rows = log.rows()
    assert "illegal memory access" in rows[1]["error"]
    assert rows[2]["error"] == "stopped the process when it was tried"
    assert "error" not in rows[3]


def test_tests_run_within_their_time(tmp_path):
    passed = gpu.run_tests(1.0, [sys.executable, "-c", "print('3 passed')"])
    assert (passed["returncode"], passed["tail"]) == (0, ["3 passed"])
    began = time.perf_counter()
    stopped = gpu.run_tests(0.01, [sys.executable, "-c", "import time; print('began', flush=True); time.sleep(60)"])
    assert time.perf_counter() - began < 20
    assert stopped["returncode"] is None
    assert stopped["why"] == "not finished in 0.01 minutes"
    assert gpu.run_tests(0.0) == {"ran": False, "why": "--test-minutes 0"}


# --- Commands ---------------------------------------------------------------------------------------------------------


@no_gpu
def test_without_a_gpu_the_command_says_so_before_it_does_anything(tmp_path):
    with pytest.raises(SystemExit, match="no CUDA device"):
        gpu.main(["--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_the_whole_command_with_a_stand_in_for_the_device(tmp_path, monkeypatch, capsys):
    """Everything but CUDA itself: ceilings, tests, cases, compiled parts, the record, the picture; and once more."""
    ceilings_of_gpu = ceilings_module()
    measured = []
    monkeypatch.delenv(gpu.DEADLINE, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(ceilings_of_gpu, "measured", lambda time: measured.append("ceilings") or H200)
    monkeypatch.setattr(gpu, "run_tests", lambda minutes: measured.append("tests") or {"ran": True, "returncode": 0})
    monkeypatch.setattr(gpu, "environment", lambda: {"device": "stand-in"})
    monkeypatch.setattr(gpu, "gpu_device", lambda ceilings: dataclasses.replace(device(), ceilings=ceilings))
    monkeypatch.setattr(gpu, "choose", lambda only: SMALL)
    monkeypatch.setattr(gpu, "choose_thresholds", lambda only: ["rational"])
    monkeypatch.setattr(gpu._thresholds, "measure", lambda op, place: (4096, {}))
    monkeypatch.setattr(gpu._thresholds, "_capability", lambda place: 90)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
    for _ in range(2):
        gpu.main(["--out", str(tmp_path)])
        monkeypatch.delenv(gpu.DEADLINE)
    assert measured == ["ceilings", "tests"]
    record = json.loads((tmp_path / "gpu_speed.json").read_text())
    assert len(record["rows"]) == 4
    assert all({OURS, DEFINITION, COMPILED} <= found["contestants"].keys() for found in record["rows"])
    assert record["ceilings"]["copy"] == H200.copy
    assert record["not_reached"] == []
    assert record["picture"] == "drew gpu_speed.png"
    assert len((tmp_path / "cases.jsonl").read_text().splitlines()) == 2 + 2 * 9  # begun and done
    assert json.loads((tmp_path / "thresholds.json").read_text())["rational"]["sm90"] == 4096
    assert "wrote" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--out is needed"),
        (["--out", "x", "--peers", "/nowhere"], "/nowhere is no folder"),
        (["--out", "x", "--minutes", "0"], "must be above 0"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        gpu.main(arguments)
    assert message in capsys.readouterr().err


def test_unknown_ops_are_refused():
    with pytest.raises(SystemExit, match="snake: no such op; there are selective_scan"):
        gpu.choose(["snake"])
    assert [op.name for op in gpu.choose(["rational"])] == ["rational"]
    assert len(gpu.choose(["basis_linear"])) == 5


@pytest.mark.slow
def test_a_checkout_without_installation_lists_its_cases_with_torch_alone(tmp_path):
    """Nothing but torch can be imported, no `.pth` file is read, and the working folder is another one."""
    code = (
        "import runpy, sys\n"
        f"sys.path.insert(0, {str(REPOSITORY)!r})\n"
        "sys.argv = ['benchmarks', 'gpu', '--dry-run', '--only', 'rational', 'selective_scan']\n"
        "try:\n    runpy.run_module('benchmarks', run_name='__main__')\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "import archzoo.kernels, subprocess\n"
        "print(archzoo.kernels.__file__)\n"
        "code = 'import archzoo.kernels; print(archzoo.kernels.__file__)'\n"
        "print(subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout)\n"
    )
    blocked = (*(set(HEAVY) - {"triton"}), "numpy", "safetensors", "omegaconf", "pytest")
    quiet = "import warnings; warnings.simplefilter('ignore')\n"  # torch says that numpy is missing
    out = run_python(without(blocked) + quiet + code, options=["-S"], path=SITE_PACKAGES, cwd=tmp_path)
    lines = [line for line in out.splitlines() if line]
    scan = next(line for line in lines if line.startswith("selective_scan batch=8"))
    assert "floor forward 0.275 ms (special functions)" in scan
    assert any(line.startswith("missing peer of selective_scan, mamba-ssm: not importable") for line in lines)
    assert [line for line in lines if line.endswith("__init__.py")] == [str(REPOSITORY / "kernels/__init__.py")] * 2


def test_the_page_of_kernels_runs_with_torch_alone():
    page = (REPOSITORY / "docs/kernels.md").read_text()
    code = page.partition("```python\n")[2].partition("```")[0]
    quiet = "import warnings; warnings.simplefilter('ignore')\n"
    run_python(without((*HEAVY, "numpy")) + quiet + code)


def test_cpu_measures_prints_and_records(tmp_path, monkeypatch, capsys):
    path = tmp_path / "cpu_speed.json"
    monkeypatch.setattr(cpu, "choose", lambda only: SMALL)
    monkeypatch.setitem(_speed.RECORDS, "cpu", path)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)  # else a minute
    monkeypatch.setattr(cpu, "peak", lambda call: (call(), 64)[1])  # the profiler's output is noisy
    cpu.main(["--seconds", "0.001", "--record"])
    record = json.loads(path.read_text())
    assert [row["op"] for row in record["rows"]] == ["rational", "normalized_residual"]
    assert record["rows"][0]["contestants"].keys() == {OURS, DEFINITION, COMPILED, OURS_COMPILED}
    assert record["summary"]["graph_breaks"] == {}
    assert record["summary"]["not_repeatable"] == []
    out = capsys.readouterr().out
    assert "Geometric mean over ops" in out
    assert "| `rational` | rows=5 features=8 groups=2 |" in _speed.speed_table()
    with pytest.raises(SystemExit):
        cpu.main(["--only", "rational", "--record"])


def test_a_slow_contestant_runs_once():
    runs = {"slow": 0, "fast": 0}

    def work(name, seconds):
        runs[name] += 1
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass

    found = cpu.race({"slow": lambda: work("slow", 0.03), "fast": lambda: work("fast", 1e-4)}, 0.03)
    assert runs["slow"] == 1
    assert runs["fast"] > cpu.LEAST_ROUNDS
    assert found["fast"]["least"] <= found["fast"]["p20"] <= found["fast"]["p50"] <= found["fast"]["p80"]
    assert found["slow"]["least"] >= 30


# --- What records say -------------------------------------------------------------------------------------------------


def row(op, size, floor=0.5, **ratios):
    contestants = {"ours": {"fb_ms": {"p50": 1.0}, "fb_ratio": 1.0, "f_ms": {"p50": 0.5}, "f_ratio": 1.0}}
    contestants |= {name: {"fb_ratio": value, "f_ratio": value} for name, value in ratios.items()}
    return {
        "op": op,
        "size": {"rows": size},
        "dtype": "bfloat16",
        "contestants": contestants,
        "floor": {"f_ms": floor * 0.5, "fb_ms": floor},
        "repeatable": True,
        "graph_breaks": 0,
    }


def test_summary_is_of_the_fastest_public_code_and_of_the_compiled_definition():
    rows = [
        row("rational", 1, FlashKAT=2.0, other=8.0, definition=0.5, **{COMPILED: 4.0}),
        row("rational", 2, FlashKAT=0.5, other=8.0),
        row("normalized_residual", 1, definition=16.0, floor=0.9, **{COMPILED: 4.0}),
    ]
    rows[0]["contestants"]["yard"] = {"fb_ratio": 0.1, "yardstick": True}
    rows[1]["repeatable"] = False
    found = _speed.summary(OPS, rows, "gpu")
    assert found["public"]["geometric_mean"] == 2.0  # of 1 = sqrt(2 x 0.5), and of 4
    assert found["public"]["worst"] == {"case": "rational rows=2 bfloat16", "against": "FlashKAT", "ratio": 0.5}
    assert (found["public"]["mean_met"], found["public"]["worst_met"]) == (True, False)
    assert (found["compiled"]["cases"], found["compiled"]["geometric_mean"]) == (2, 4.0)
    assert found["not_repeatable"] == ["rational rows=2 bfloat16"]
    goals = {(goal["op"], goal["goal"]): (goal["value"], goal["met"]) for goal in found["goals"]}
    assert goals["rational", "forward + backward >= 1.3 x FlashKAT"] == (2.0, True)
    assert goals["rational", "forward >= 0.75 of the floor"] == (0.5, False)
    assert goals["normalized_residual", "forward >= 0.85 of the floor"] == (0.9, True)
    assert goals["selective_scan", "forward + backward >= 1 x mamba-ssm"] == (None, None)


def test_compiled_is_held_against_compiled_where_both_are():
    both = row("normalized_residual", 1, definition=1.5, **{COMPILED: 0.6, OURS_COMPILED: 0.5})
    assert _speed.alternatives(both) == {"definition": 1.5, COMPILED: 1.2}
    assert _speed.best(both) == (COMPILED, 1.2)


def test_tables_show_records_and_what_is_faster(tmp_path, monkeypatch):
    rows = [row("rational", 1, FlashKAT=0.8, definition=3.0), row("normalized_residual", 1, definition=4.0)]
    machine = {"device": "NVIDIA H200", "commit": "abc+", "torch": "2.11", "cpu": "EPYC", "threads": 1}
    record = {"command": "python -m benchmarks gpu --out x", "wall_s": 500.0, "environment": machine, "rows": rows}
    record["summary"] = _speed.summary(OPS, rows, "gpu")
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(record))
    monkeypatch.setitem(_speed.RECORDS, "gpu", path)
    monkeypatch.setitem(_speed.RECORDS, "cpu", tmp_path / "none.json")
    lines = {line.split("`")[1]: line for line in _speed.kernels_table(OPS).splitlines() if line.startswith("| `")}
    assert "| 0.50 / 0.50 | 0.8× FlashKAT | not recorded |" in lines["rational"]
    assert "on the GPU 0.8× FlashKAT at rows=1" in lines["rational"]
    assert _speed.NO_GPU in lines["selective_scan"]
    assert "abc with uncommitted changes, NVIDIA H200" in _speed.kernels_table(OPS)
    assert "python -m benchmarks cpu --record" in _speed.speed_table()
    assert gpu.draw(rows, tmp_path / "speed.png") == "drew speed.png"
    assert (tmp_path / "speed.png").stat().st_size > 10_000
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    assert gpu.draw(rows, tmp_path / "speed.png") == "no picture: matplotlib is not installed"


def test_the_table_of_thresholds_has_what_was_measured(tmp_path, monkeypatch):
    table = tmp_path / "thresholds.json"
    monkeypatch.setattr(_speed._thresholds, "TABLE", table)
    table.write_text("{}")
    assert _speed.thresholds_table() == "Not measured on any device yet: on every GPU Triton takes all sizes."
    measured = {"rational": {"sm90": 0}, "basis_linear:cubic": {"sm90": 65536, "sm100": 4096}}
    table.write_text(json.dumps(measured | {"basis_linear:rbf": {"sm90": 8192}}))
    lines = _speed.thresholds_table().splitlines()
    assert lines[0] == "| op | its numbers | torch below, sm90 | torch below, sm100 |"
    assert "| `rational` | x | 0 | not measured |" in lines
    assert "| `basis_linear` | x; each kind of basis by itself | cubic 65,536, rbf 8,192 | cubic 4,096 |" in lines
    assert "| `ssd` | x, times the states of a head | not measured | not measured |" in lines


def test_a_record_has_everything_of_both_parts(tmp_path):
    log = gpu.Log(tmp_path / "cases.jsonl")
    log.add({"ceilings": {"copy": 4e12}})
    log.add({"tests": {"ran": False}})
    log.add({"done": "a", "row": row("rational", 1, definition=3.0)})
    second = row("rational", 1, **{COMPILED: 2.0})
    second["contestants"]["ours"]["fb_ms"] = {"p50": 7.0}
    log.add({"done": "b", "row": second})
    record = gpu.record_of(log, SMALL, ["c"], "command", 1.0)
    (found,) = record["rows"]
    assert found["contestants"].keys() == {"ours", DEFINITION, COMPILED}
    assert found["contestants"]["ours"]["fb_ms"] == {"p50": 1.0}
    assert record["not_reached"] == ["c"]
    assert record["environment"]["versions"].keys() == set(gpu.PACKAGES)


def test_ceilings_kernel_computes_its_chains():
    ceilings_of_gpu = ceilings_module()
    place = "cuda" if torch.cuda.is_available() else "cpu"
    for special in (False, True):
        y = torch.empty(64, device=place)
        ceilings_of_gpu.chains(y, special, steps=3, block=32)
        start = torch.arange(64, device=place) * -1e-9
        x = torch.stack([start, start - 0.25, start - 0.5, start - 0.75])
        for _ in range(3):
            x = torch.exp2(x) - 1 if special else x * 0.999 + 0.001
        torch.testing.assert_close(y, x.sum(0), rtol=1e-5, atol=1e-5)


# --- Peers ------------------------------------------------------------------------------------------------------------


def test_peers_without_a_network_or_nvcc_say_so(tmp_path, monkeypatch, capsys):
    def offline(command, log, *rest):
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("looking\nno route to host\n")
        return 1

    monkeypatch.setattr(peers, "run", offline)
    monkeypatch.setattr(peers.signal, "signal", lambda *rest: None)
    with pytest.raises(SystemExit) as stop:
        peers.main(["--out", str(tmp_path)])
    assert stop.value.code == 1
    out = capsys.readouterr().out
    assert out.count("is there a network?") == 1 + len(peers.SOURCES)
    assert "no route to host" in out
    monkeypatch.setattr(peers, "cuda_home", lambda: None)
    assert "no nvcc" in peers.build(tmp_path, peers.SOURCES[0], "sm_90", 1.0)


def test_a_build_that_was_cut_off_goes_on(tmp_path, monkeypatch, capsys):
    """With a source package made here, and a compiler that needs two calls."""
    sources, site = tmp_path / "made" / "mamba_ssm-1", tmp_path / "out" / "site"
    (sources / "mamba_ssm").mkdir(parents=True)
    (sources / "setup.py").write_text("flags = ['-std=c++17']")
    (sources / "mamba_ssm" / "ops.py").write_text("")
    (tmp_path / "out" / "sdists").mkdir(parents=True)
    archive = tmp_path / "out" / "sdists" / "mamba_ssm-1.tar.gz"
    subprocess.run(["tar", "czf", archive, "-C", tmp_path / "made", "mamba_ssm-1"], check=True)
    home = tmp_path / "cuda"
    monkeypatch.setattr(peers, "cuda_home", lambda: home)
    monkeypatch.setattr(peers, "SOURCES", peers.SOURCES[:1])
    monkeypatch.setattr(peers, "WHEELS", ())
    calls = []

    def compiler(command, log, seconds, env, cwd):
        calls.append((command, env, cwd))
        assert (cwd / "setup.py").read_text() == "flags = ['-std=c++20']"
        lib = tmp_path / "out" / "build" / "mamba_ssm_lib"
        lib.mkdir(parents=True, exist_ok=True)
        if len(calls) == 1:
            return None
        (lib / "selective_scan_cuda.cpython.so").write_text("")
        return 0

    monkeypatch.setattr(peers, "run", compiler)
    monkeypatch.setattr(peers.signal, "signal", lambda *rest: None)
    arguments = ["--out", str(tmp_path / "out"), "--arch", "9.0"]
    with pytest.raises(SystemExit):
        peers.main(arguments)
    assert "not finished; the same command goes on" in capsys.readouterr().out
    peers.main(arguments)
    peers.main(arguments)  # nothing is left to do
    assert len(calls) == 2
    assert calls[0] == calls[1]
    assert (site / "selective_scan_cuda.cpython.so").exists()
    assert (site / "mamba_ssm" / "ops.py").exists()
    home.joinpath("bin").mkdir(parents=True)
    real = home / "bin" / "nvcc"
    real.write_text("#!/bin/sh\necho $@\n")
    real.chmod(0o755)
    asked = ["-O3", "-gencode", "arch=compute_80,code=sm_80", "-gencode", "arch=compute_90,code=sm_90", "x.cu"]
    told = subprocess.run([tmp_path / "out" / "nvcc", *asked], capture_output=True, text=True, check=True).stdout
    assert told.split() == ["-O3", "-gencode", "arch=compute_90,code=sm_90", "x.cu"]


def test_a_command_that_takes_too_long_is_ended(tmp_path):
    log = tmp_path / "logs" / "log.txt"
    command = [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"]
    assert peers.run(command, log, 0.0) is None
    assert peers.run([sys.executable, "-c", "print('a'); print('b'); raise SystemExit(3)"], log, 60.0) == 3
    assert peers.last_lines(log) == "a | b"


def test_architectures_are_checked():
    assert peers.architecture("10.0") == "sm_100"
    with pytest.raises(SystemExit, match="must be a compute capability"):
        peers.architecture("sm_90")
