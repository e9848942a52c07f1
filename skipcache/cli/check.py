"""``skipcache check``."""

from __future__ import annotations

import argparse
import textwrap
import warnings
from typing import Any


def add_to(commands: Any) -> None:
    """Registers the command."""
    parser = commands.add_parser(
        "check",
        help="run the conformance checks on an adapter and a transformer",
        description="Runs every check of skipcache.testing. Exit status 1 when one fails.",
    )
    parser.add_argument(
        "factory",
        metavar="MODULE:FACTORY",
        help="a function that returns a transformer and the keyword arguments of one forward, or "
        "a skipcache.testing.AdapterCase",
    )
    parser.add_argument("--adapter", help="its name; default: whichever claims the transformer")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Prints one line a check, and below it why it failed or was skipped."""
    from skipcache.cli.factory import case_of
    from skipcache.testing import Check, CheckSkipped
    from skipcache.testing.checks import CHECKS, CHECKS_IN_PLACE

    case = case_of(arguments.factory, arguments.adapter)
    print(f"adapter {case.backbone.name!r}, {case.depth} layers")
    counts = {"passed": 0, "skipped": 0, "FAILED": 0}
    for function in CHECKS_IN_PLACE if case.in_place else CHECKS:
        check, reason = Check(function.__name__, function, case), ""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                check()
                result = "passed"
            except CheckSkipped as skipped:
                result, reason = "skipped", str(skipped)
            except Exception as error:  # whatever is wrong with one, the others are still told
                result, reason = "FAILED", str(error)
        counts[result] += 1
        print(f"{result:<8}{check.name}", flush=True)
        if reason:
            print(textwrap.indent(textwrap.fill(reason, 92), " " * 8))
    print(", ".join(f"{count} {result}" for result, count in counts.items()))
    return int(counts["FAILED"] > 0)
