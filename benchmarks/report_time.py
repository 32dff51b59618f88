"""CPU seconds that the report of a comparison takes, everything loaded. Goal: under 5 for 100 runs."""

import argparse
import json
import time
from pathlib import Path

from archzoo.report import load_comparison
from archzoo.report.write import write_report
from benchmarks._record import environment


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks report_time", description=__doc__)
    parser.add_argument("folder", type=Path, help="as outputs/kan_functions; its report is written anew")
    args = parser.parse_args(argv)
    runs = len(load_comparison(args.folder).runs)
    write_report(args.folder)  # loads matplotlib, its fonts and the templates
    began = time.process_time()
    write_report(args.folder)
    print(json.dumps({"runs": runs, "cpu_s": round(time.process_time() - began, 2), **environment()}))
