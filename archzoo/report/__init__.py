"""The comparison: table, plots, dashboard.

>>> from archzoo.report import load_comparison, rank, write_report

Nothing here imports torch, and numpy, scipy, matplotlib, rich and jinja2 are imported when a report is made.
"""

from archzoo.report.compare import Change, compare, compare_reports
from archzoo.report.console import console_table
from archzoo.report.contestants import Comparison, Contestant
from archzoo.report.load import load_comparison
from archzoo.report.ranking import Row, TaskFigure, rank
from archzoo.report.runs import Budget, Divergence, Run
from archzoo.report.stats import Interval
from archzoo.report.write import write_report

__all__ = [
    "Budget",
    "Change",
    "Comparison",
    "Contestant",
    "Divergence",
    "Interval",
    "Row",
    "Run",
    "TaskFigure",
    "compare",
    "compare_reports",
    "console_table",
    "load_comparison",
    "rank",
    "write_report",
]
