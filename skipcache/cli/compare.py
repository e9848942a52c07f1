"""``skipcache compare``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from skipcache.cli.bench import add_subject_arguments, subject_of


def add_to(commands: Any) -> None:
    """Registers the command."""
    parser = commands.add_parser(
        "compare",
        help="uncached against cached, for a prompt or a few, as one HTML page",
        description="The short form of bench and report.",
    )
    add_subject_arguments(parser)
    parser.add_argument("--prompt", help="a single one, instead of a file of prompts")
    parser.add_argument("--interval", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--samples", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("skipcache_compare.html"), help="the page")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Samples, and writes the page."""
    import sys
    import tempfile

    from skipcache.evaluation.bench.methods import skip_cache_method
    from skipcache.evaluation.bench.run import Plan, run_bench
    from skipcache.evaluation.report.report import markdown_table, write_report

    subject = subject_of(arguments, steps=arguments.steps)
    interval = arguments.interval
    method = skip_cache_method(f"interval {interval}", interval=interval)
    count = arguments.samples
    plan = Plan(count, count, repeats=3, seed=arguments.seed, shown=count)
    command = ("skipcache", *sys.argv[1:])
    with tempfile.TemporaryDirectory() as folder:
        results = run_bench(subject, [method], folder, plan, command=command)
        path = write_report([folder], arguments.out)
    print(f"\n{markdown_table(results)}\n\nPage: {path}")
    return 0
