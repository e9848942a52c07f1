"""The ``skipcache`` command: parses, calls one public function, prints."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from skipcache import __version__
from skipcache.cli import (
    adapters,
    bench,
    calibrate,
    check,
    compare,
    convert,
    demo,
    explain,
    report,
    smoothness,
    suggest,
)
from skipcache.errors import SkipCacheError

_RESUMABLE = (bench.run, calibrate.run)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the ``skipcache`` command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="skipcache", description="Diffusion transformers that sample faster."
    )
    parser.add_argument("--version", action="version", version=f"skipcache {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (
        demo,
        compare,
        calibrate,
        explain,
        bench,
        report,
        adapters,
        check,
        suggest,
        convert,
        smoothness,
    ):
        command.add_to(commands)
    arguments = parser.parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except (SkipCacheError, OSError) as error:
        print(f"skipcache: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        resumable = ". The same command goes on where it was." * (arguments.run in _RESUMABLE)
        print(f"skipcache: stopped{resumable}", file=sys.stderr)
        return 130
