"""``skipcache report``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_to(commands: Any) -> None:
    """Registers the command."""
    parser = commands.add_parser(
        "report",
        help="write results of skipcache bench as one HTML page, as plots and as Markdown",
        description="Writes one HTML file with everything inside: plots, tables, pictures. It "
        "opens from the disk and needs no network.",
    )
    parser.add_argument(
        "results",
        metavar="RESULTS",
        nargs="+",
        type=Path,
        help="folder that skipcache bench has written, or its results.json; a section each",
    )
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="the page")
    parser.add_argument(
        "--plots", type=Path, metavar="FOLDER", help="also write the plots, as PNG and SVG"
    )
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help="also write the tables, as Markdown"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Writes what was asked for, and prints the names of the files."""
    from skipcache.evaluation.report.markdown import write_markdown
    from skipcache.evaluation.report.plots import write_plots
    from skipcache.evaluation.report.report import load_results, write_report

    files = [write_report(arguments.results, arguments.out)]
    loaded = [results for _, results in load_results(arguments.results)]
    if arguments.plots is not None:
        files += write_plots(loaded, arguments.plots)
    if arguments.markdown is not None:
        files.append(write_markdown(loaded, arguments.markdown))
    for file in files:
        print(file)
    return 0
