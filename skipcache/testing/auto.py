"""``adapter="auto"``: a controller that waits for the first forward, and guesses from it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from skipcache import api
from skipcache.backbone import Backbone, BlockList
from skipcache.config import SkipCacheConfig
from skipcache.errors import AdapterError, SkipCacheError
from skipcache.estimators import Hold
from skipcache.runtime.controller import Controller
from skipcache.runtime.layout import BoundBackbone
from skipcache.testing.case import Inputs, named_inputs
from skipcache.testing.guess import ENTRY_POINTS, guess_backbone

# Stands for the backbone until there is one; it has no lists, so nothing is cached.
_NOTHING = BoundBackbone(
    Backbone("auto", (BlockList("not known yet"),), timestep=None, entry_points=ENTRY_POINTS), (), 0
)


class GuessingController(Controller):
    """Replaces itself, at the first forward without gradients, by the controller of what it
    guessed.
    """

    def __init__(self, transformer: nn.Module, config: SkipCacheConfig) -> None:
        """Builds without touching the transformer."""
        super().__init__(transformer, _NOTHING, 0, 1, config.resolve_schedule(), Hold())
        self.config = config

    def before(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Guesses, installs, and lets the new controller begin the forward.

        Raises:
            AdapterError: nothing could be guessed; the cache is taken off then.
            ConfigError: the configuration does not fit what was guessed; likewise.
        """
        if torch.is_grad_enabled():
            self._warn_once("gradients are on, so nothing is guessed yet. Sample under no_grad().")
            return
        transformer = self.transformer
        assert transformer is not None
        clock = self.clock
        pipelines = [link.pipeline for link in clock.links if link.pipeline is not None]
        context, explicit = clock.context, clock.explicit
        taps = [transformer.__dict__.get(name) for name in ENTRY_POINTS]

        def hand_over(controller: Controller) -> None:
            for pipeline in pipelines:
                controller.clock.attach(pipeline, fresh=True)
            controller.install(transformer)
            # A skip_cache_run under way, a named pass and a method go on with the new controller.
            clock.explicit = controller.clock.explicit = explicit
            if context is not None:
                controller.clock.context = transformer.__dict__["cache_context"] = context
            for tap in taps:
                if tap is not None:
                    tap.controller = controller

        self.uninstall(transformer)
        try:
            backbone = guess_backbone(transformer, _inputs_of(transformer, args, kwargs))
            following = api.build_controller(transformer, self.config, backbone)
        except SkipCacheError as error:
            raise type(error)(f"{error} The cache was taken off again.") from error
        except BaseException:  # an error of the model's own, or Ctrl-C: wait for the next forward
            hand_over(self)
            raise
        hand_over(following)
        following.before(args, kwargs)


def _inputs_of(transformer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
    """The arguments of a call by name; without those that only another method takes.

    Raises:
        AdapterError: one was passed by position, and the forward has no name for it.
    """
    parameters = list(inspect.signature(type(transformer).forward).parameters.values())[1:]
    kinds = {parameter.kind for parameter in parameters}
    named = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    if (args and inspect.Parameter.POSITIONAL_ONLY in kinds) or (
        len(args) > len(named) and inspect.Parameter.VAR_POSITIONAL in kinds
    ):
        raise AdapterError(
            f"{type(transformer).__qualname__!r} cannot be guessed: its forward has no names for "
            "what it was given by position. Pass it by keyword, or write an adapter, see "
            "docs/how-to/write-an-adapter.md."
        )
    inputs = named_inputs(named, args, kwargs)
    if inspect.Parameter.VAR_KEYWORD in kinds:
        return inputs
    known = {parameter.name for parameter in parameters}
    return {name: value for name, value in inputs.items() if name in known}
