"""Surroundings that a command may find itself in, each as a line of bash around `$RUN`, the command."""

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.faults.support import COMMAND
from tests.helpers import REPOSITORY

TRAIN = [sys.executable, str(REPOSITORY / "train.py")]
SETTINGS = [*COMMAND, "trainer.steps=4", "trainer.checkpoint_every=2", "trainer.eval_every=2"]


@dataclass(frozen=True)
class Place:
    """A line of bash; where the run's folder is to be; the exit code; what stderr says."""

    bash: str = "$RUN"
    output_dir: str = "out"
    code: int = 0
    says: str = ""


PLACES = {
    "plain": Place(),
    "the C locale": Place("unset LANG; LC_ALL=C $RUN"),
    "an ASCII terminal and no UTF-8 mode": Place(
        "LC_ALL=POSIX PYTHONCOERCECLOCALE=0 PYTHONUTF8=0 PYTHONIOENCODING=ascii:strict $RUN"
    ),
    "an ASCII terminal and a name that it cannot tell": Place(
        "LC_ALL=POSIX PYTHONCOERCECLOCALE=0 PYTHONUTF8=0 $RUN", "sortie_é_日本", 2, "set PYTHONUTF8=1"
    ),
    "a Turkish locale": Place("LC_ALL=tr_TR.UTF-8 LANGUAGE=tr $RUN"),
    "another time zone, by a rule": Place("TZ=ABC-14:45 $RUN"),
    "no HOME": Place("env -u HOME -u XDG_CACHE_HOME -u XDG_CONFIG_HOME $RUN"),
    "a HOME that cannot be written": Place("HOME=/proc/1 XDG_CACHE_HOME=/proc/1 XDG_CONFIG_HOME=/proc/1 $RUN"),
    "a TMPDIR that cannot be written": Place("TMPDIR=/proc/1 TEMP=/proc/1 TMP=/proc/1 $RUN"),
    "a full stdout": Place("$RUN > /dev/full", says="<stdout>: cannot be written ([Errno 28] No space left on device)"),
    "a full stderr": Place("$RUN 2> /dev/full"),
    "a closed stdout": Place("$RUN >&-"),
    "a closed stderr": Place("$RUN 2>&-"),
    "no standard stream at all": Place("$RUN <&- >&- 2>&-"),
    "a reader that has gone": Place("$RUN 2>&1 | true; exit ${PIPESTATUS[0]}"),
    "no TERM, one column": Place("env -u TERM COLUMNS=1 LINES=1 $RUN"),
    "a working folder with spaces, accents and signs": Place('mkdir "a é=b, [c]"; cd "a é=b, [c]"; $RUN', "out"),
    "an output folder with spaces, accents and signs": Place(output_dir="a é=b, {c} [d]"),
    "a umask that lets nobody else in": Place("umask 077; $RUN"),
    "few open files": Place("ulimit -n 40; $RUN"),
    "nohup": Place("nohup $RUN < /dev/null"),
}


def run_in(place: Place, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs the command in a shell in a folder."""
    quoted = os.path.normpath(folder / place.output_dir).replace("'", "\\'")
    script = place.bash.replace("$RUN", shlex.join([*TRAIN, *SETTINGS, f"output_dir='{quoted}'"]))
    return subprocess.run(
        ["bash", "-c", script], cwd=folder, capture_output=True, text=True, timeout=120, errors="replace"
    )


def trouble(name: str, root: Path) -> str:
    """What is wrong with a run in a place; nothing if it did what is expected there."""
    place, folder = PLACES[name], root / re.sub(r"\W", "_", name)
    folder.mkdir()
    done = run_in(place, folder)
    told = f"{name}: exit code {done.returncode}: {done.stderr[-500:]}"
    if done.returncode != place.code or place.says not in done.stderr or "Traceback" in done.stdout + done.stderr:
        return told
    if place.code:
        return "" if done.stderr.count("error: ") == 1 else told
    (weights,) = folder.rglob("model.safetensors")
    (root / "reference").mkdir(exist_ok=True)
    reference = root / "reference" / "weights"
    if name == "plain":
        reference.write_bytes(weights.read_bytes())
    same = not reference.exists() or reference.read_bytes() == weights.read_bytes()
    return "" if same else f"{name}: other weights than elsewhere"
