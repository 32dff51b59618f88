"""Gets and builds the public kernels that `gpu` measures beside ours, from PyPI, into one folder.

    python -m benchmarks peers --out FOLDER [--minutes 30] [--arch 9.0]

Steps, each of which is left out when it is done, so that the same command goes on where it was: wheels of pure Python
into FOLDER/site; sources of mamba-ssm and causal-conv1d, whose wheels are not on PyPI, into FOLDER/sdists; their CUDA
parts, built for one architecture by nvcc, into FOLDER/site. Object files stay in FOLDER/build, so that a build that was
cut off goes on with the next file. A machine without a network takes a FOLDER that another one filled so far; a machine
without nvcc stops before the builds, and says so. FlashKAT is on GitHub alone: put the folder `rational_kat` of
OSU-STARLAB/FlashKAT into FOLDER.
"""

import argparse
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

WHEELS = (
    "einops==0.8.2",
    "fla-core==0.6.0",
    "flash-linear-attention==0.6.0",
    "liger-kernel==0.8.5",
    "mambapy==1.2.0",
    "ninja",
)


@dataclass(frozen=True)
class Source:
    """A package with a CUDA part: its distribution, its Python package, the extension, its switches."""

    distribution: str
    version: str
    package: str
    extension: str
    prefix: str


SOURCES = (
    Source("mamba-ssm", "2.3.2.post1", "mamba_ssm", "selective_scan_cuda", "MAMBA"),
    Source("causal-conv1d", "1.7.0", "causal_conv1d", "causal_conv1d_cuda", "CAUSAL_CONV1D"),
)

NVCC = """#!{python}
# Leaves out all architectures but one, as the packages' own lists take ten times as long.
import os, sys
args, kept = sys.argv[1:], []
while args:
    if args[0] == "-gencode" and {arch!r} not in args[1]:
        args = args[2:]
    else:
        kept.append(args.pop(0))
os.execv({nvcc!r}, [{nvcc!r}, *kept])
"""


def run(
    command: Sequence[str], log: Path, seconds: float, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> int | None:
    """Runs a command with what it prints in a file; its return code, or None if the time was up, when it is ended."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        both = {**os.environ, **(env or {})}
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=both, cwd=cwd, start_new_session=True
        )
        try:
            return process.wait(timeout=max(1.0, seconds))
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:  # the time is up, or this process is to end
                os.killpg(process.pid, signal.SIGTERM)  # ninja then removes what is half written
                process.wait()


def last_lines(log: Path, count: int = 3) -> str:
    return " | ".join(line.strip() for line in log.read_text().splitlines()[-count:])


def get_wheels(folder: Path, seconds: float) -> str | None:
    """Installs what is pure Python. Says what went wrong, or None."""
    site, log = folder / "site", folder / "logs" / "wheels.txt"
    done = {path.name.rpartition(".")[0].split("-")[0] for path in site.glob("*.dist-info")}
    wanted = [wheel for wheel in WHEELS if wheel.partition("==")[0].replace("-", "_") not in done]
    if not wanted:
        return None
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(site), *wanted]
    code = run(command, log, seconds)
    return None if code == 0 else f"wheels: pip ended with {code} ({last_lines(log)}); is there a network?"


def get_source(folder: Path, source: Source, seconds: float) -> str | None:
    """Downloads and unpacks the sources of a package, and takes over its Python part."""
    sdists, log = folder / "sdists", folder / "logs" / f"{source.package}_download.txt"
    if not list(sdists.glob(f"{source.package}-*.tar.gz")):
        env = {f"{source.prefix}_SKIP_CUDA_BUILD": "TRUE"}  # pip asks setup.py for metadata, which must not want nvcc
        options = ["--no-deps", "--no-binary", ":all:", "--no-build-isolation", "-d", str(sdists)]
        name = f"{source.distribution}=={source.version}"
        code = run([sys.executable, "-m", "pip", "download", *options, name], log, seconds, env)
        if code != 0:
            return f"{name}: pip ended with {code} ({last_lines(log)}); is there a network?"
    unpacked = folder / "src" / source.package
    if not (unpacked / "setup.py").exists():
        (archive,) = sdists.glob(f"{source.package}-*.tar.gz")
        partial = unpacked.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        with tarfile.open(archive) as file:
            file.extractall(partial, filter="data")
        (inner,) = partial.iterdir()
        setup = inner / "setup.py"
        setup.write_text(setup.read_text().replace("-std=c++17", "-std=c++20"))  # which headers of torch 2.14 want
        inner.rename(unpacked)
        partial.rmdir()
    shutil.copytree(unpacked / source.package, folder / "site" / source.package, dirs_exist_ok=True)
    return None


def architecture(arch: str | None) -> str:
    """sm_90 for 9.0: what was asked for, or what this machine's GPU has.

    Raises:
        SystemExit: If it is malformed.
    """
    if arch is None:
        arch = "{}.{}".format(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else "9.0"
    if not re.fullmatch(r"\d+\.\d", arch):
        sys.exit(f"--arch {arch}: must be a compute capability, as 9.0")
    return f"sm_{arch.replace('.', '')}"


def cuda_home() -> Path | None:
    """The CUDA toolkit with its headers: torch takes what `nvcc` on the path lies in, which may be a script."""
    nvcc = shutil.which("nvcc")
    places = [Path(os.environ["CUDA_HOME"])] if "CUDA_HOME" in os.environ else []
    places += [Path(nvcc).resolve().parents[1]] if nvcc else []
    places += [Path("/usr/local/cuda"), *sorted(Path("/usr/local").glob("cuda-*"), reverse=True)]
    wanted = ("bin/nvcc", "include/cuda_runtime.h")
    return next((home for home in places if all((home / file).exists() for file in wanted)), None)


def build(folder: Path, source: Source, arch: str, seconds: float) -> str | None:
    """Builds the CUDA part of a package."""
    if list((folder / "site").glob(f"{source.extension}*.so")):
        return None
    if (home := cuda_home()) is None:
        return f"{source.extension}: not built: no nvcc with CUDA's headers; the folder can go on where there is one"
    wrapper, log = folder / "nvcc", folder / "logs" / f"{source.package}_build.txt"
    wrapper.write_text(NVCC.format(python=sys.executable, arch=arch, nvcc=str(home / "bin" / "nvcc")))
    wrapper.chmod(wrapper.stat().st_mode | stat.S_IXUSR)
    env = {
        f"{source.prefix}_FORCE_BUILD": "TRUE",
        "CUDA_HOME": str(home),
        "PYTORCH_NVCC": str(wrapper),
        "PATH": f"{folder / 'site' / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(folder / "site"), os.environ.get("PYTHONPATH")])),
        "MAX_JOBS": os.environ.get("MAX_JOBS", str(max(1, (os.cpu_count() or 1) // 2))),
    }
    lib = folder / "build" / f"{source.package}_lib"
    options = ["--build-temp", str(folder / "build" / source.package), "--build-lib", str(lib)]
    command = [sys.executable, "setup.py", "build_ext", *options]
    code = run(command, log, seconds, env, folder / "src" / source.package)
    if code is None:
        return f"{source.extension}: not finished; the same command goes on with the next file"
    if code != 0:
        return f"{source.extension}: the build ended with {code} ({last_lines(log)}); all of it in {log}"
    for built in lib.glob(f"{source.extension}*.so"):
        shutil.copy(built, folder / "site")
    return None


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder, for --peers of `gpu`")
    parser.add_argument("--minutes", type=float, default=30.0, help="for all of it")
    parser.add_argument("--arch", help="compute capability to build for; by default this machine's, or 9.0")
    args = parser.parse_args(argv)
    if not args.minutes > 0:
        parser.error(f"argument --minutes: {args.minutes:g}: must be above 0")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a build ends with us
    folder, arch = args.out.resolve(), architecture(args.arch)
    (folder / "site").mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * args.minutes
    problems = [get_wheels(folder, end - time.monotonic())]
    for source in SOURCES:
        problem = get_source(folder, source, end - time.monotonic())
        problems.append(problem or build(folder, source, arch, end - time.monotonic()))
    told = [problem for problem in problems if problem is not None]
    for problem in told:
        print(problem)
    if told:
        sys.exit(1)
    print(f"all peers are in {folder}: python -m benchmarks gpu --out DIR --peers {args.out}")
