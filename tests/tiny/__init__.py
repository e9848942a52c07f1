"""Tiny configurations of every transformer of diffusers, written from the classes' signatures."""

import importlib
import pkgutil

from tiny.registry import TINY, Tiny, enliven, randn

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"tiny.{_module.name}")

__all__ = ["TINY", "Tiny", "enliven", "randn"]
