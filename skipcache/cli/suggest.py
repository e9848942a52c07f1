"""``skipcache suggest``."""

from __future__ import annotations

import argparse
from typing import Any


def add_to(commands: Any) -> None:
    """Registers the command."""
    parser = commands.add_parser(
        "suggest",
        help="trace a transformer that no adapter claims, and print an adapter for it",
        description="Traces a forward, proposes a description, checks it, and prints the source "
        "of an adapter. Fails rather than print one that did not pass.",
    )
    parser.add_argument(
        "factory",
        metavar="MODULE:FACTORY",
        help="a function that returns a transformer and the keyword arguments of one forward, or "
        "a skipcache.testing.AdapterCase",
    )
    parser.add_argument("--name", default="my_adapter", help="of the adapter; default: %(default)s")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Prints the source of an adapter module."""
    from skipcache.cli.factory import case_of
    from skipcache.testing.guess import adapter_source, guess_backbone

    case = case_of(arguments.factory)
    transformer = case.build()
    backbone = guess_backbone(transformer, case.make_inputs(0), arguments.name)
    print(adapter_source(transformer, backbone), end="")
    return 0
