"""The command `archzoo`: train, report, layers."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command `archzoo`; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["train"]:  # the rest is Hydra's
        from archzoo.training.cli import main as train

        return train(arguments[1:])
    if arguments[:1] == ["plan"]:  # so is most of this
        from archzoo.training.planning import main as plan

        return plan(arguments[1:])
    if arguments[:1] == ["wandb-sweep"]:
        from archzoo.training.wandb_sweep import main as wandb_sweep

        return wandb_sweep(arguments[1:])
    parser = argparse.ArgumentParser(prog="archzoo", description="A zoo of alternative neural architectures.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("train", help="what train.py does: archzoo train experiment=digits", add_help=False)
    commands.add_parser("plan", help="what it will take: archzoo plan experiment=digits --gpus 8", add_help=False)
    commands.add_parser("wandb-sweep", help="archzoo train's sweep as one of W&B's: its YAML", add_help=False)
    report = commands.add_parser("report", help="write the report of a comparison, or compare two")
    report.add_argument("folder", nargs="?", type=Path, help="as outputs/digits")
    report.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"), help="two comparisons side by side")
    report.add_argument("--baseline", help="contestant that the others are tested against; default: linear")
    dashboard = commands.add_parser("dashboard", help="send a comparison to W&B: runs, a workspace, a report")
    dashboard.add_argument("folder", type=Path, help="as outputs/digits")
    dashboard.add_argument("--entity", help="user or team; default: the runs' own, else the login's")
    dashboard.add_argument("--project", help="default: the runs' own")
    dashboard.add_argument("--baseline", help="as of report")
    dashboard.add_argument("--dry-run", action="store_true", help="only write what would be sent; needs no login")
    layers = commands.add_parser("layers", help="list the layers and their papers")
    layers.add_argument("pattern", nargs="?", help="only names that match this glob, as '*kan*'")
    args = parser.parse_args(arguments)
    try:
        if args.command == "dashboard":
            return _dashboard(args)
        return _layers(args.pattern) if args.command == "layers" else _report(parser, args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _layers(pattern: str | None) -> int:
    from archzoo.registry import get_layer, list_layers

    for name in list_layers(pattern=pattern):
        entry = get_layer(name)
        print(f"{name} ({entry.kind}): {entry.card}\n")
    return 0


def _report(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    if (args.folder is None) == (args.compare is None):
        parser.error("report takes one folder, or --compare and two")
    from archzoo.report import compare_reports, write_report

    if args.compare:
        compare_reports(*args.compare)
        return 0
    print_table(args.folder, args.baseline)
    print(f"report: {write_report(args.folder, args.baseline)}")
    return 0


def _dashboard(args: argparse.Namespace) -> int:
    from archzoo.training.dashboards import make_dashboard

    options = {"entity": args.entity, "project": args.project, "baseline": args.baseline, "dry_run": args.dry_run}
    return make_dashboard(args.folder, **options)


def print_table(folder: Path, baseline: str | None) -> None:
    """Prints the ranked table of a comparison."""
    from rich.console import Console

    from archzoo.report import console_table, load_comparison
    from archzoo.report.ranking import default_baseline

    comparison = load_comparison(folder)
    # Where there is no terminal, rich would cut the table to 80 columns.
    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)
    console.print(console_table(comparison, baseline or default_baseline(comparison)))


if __name__ == "__main__":
    sys.exit(main())
