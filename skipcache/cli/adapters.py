"""``skipcache adapters``."""

from __future__ import annotations

import argparse
import warnings
from typing import Any

from skipcache.errors import PluginWarning


def add_to(commands: Any) -> None:
    """Registers the command."""
    parser = commands.add_parser(
        "adapters",
        help="list the adapters: where each comes from, what it claims, what failed to load",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Prints one paragraph an adapter; exit status 1 when one failed to load."""
    from skipcache.plugins import default_registry

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PluginWarning)  # shown below, each with its reason
        adapters = default_registry().adapters()
    for adapter in adapters:
        print(f"{adapter.name}  ({adapter.origin})")
        if adapter.failure is not None:
            print(f"  FAILED TO LOAD: {adapter.failure}")
        for claim in adapter.claims:
            print(f"  {claim}")
        for refused, reason in adapter.refusals.items():
            print(f"  not {refused}: {reason}")
    if not adapters:
        print("No adapter is installed. See docs/how-to/write-an-adapter.md.")
    return int(any(adapter.failure is not None for adapter in adapters))
