"""``adapter="auto"``: a controller that waits for the first forward, and guesses from it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from skipcache import api
from skipcache.backbone import Backbone, BlockList
from skipcache.config import SkipCacheConfig
from skipcache.errors import AdapterError
from skipcache.runtime.controller import Controller
from skipcache.runtime.layout import BoundBackbone
from skipcache.testing.case import named_inputs
from skipcache.testing.guess import guess_backbone
from skipcache.testing.trace import parameters_of

# Stands for the backbone until there is one; it has no lists, so nothing is cached.
_NOTHING = BoundBackbone(Backbone("auto", (BlockList("not known yet"),)), (), 0)


class GuessingController(Controller):
    """Replaces itself, at the first forward without gradients, by the controller of what it
    guessed.
    """

    def __init__(self, transformer: nn.Module, config: SkipCacheConfig) -> None:
        """Builds without touching the transformer."""
        schedule = config.resolve_schedule()
        estimator = config.resolve_estimator(has_branches=False)
        super().__init__(transformer, _NOTHING, 0, 1, schedule, estimator)
        self.config = config

    def before(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Guesses, installs, and lets the new controller begin the forward.

        Raises:
            AdapterError: nothing could be guessed; the cache is taken off then.
        """
        if torch.is_grad_enabled():
            self._warn_once("gradients are on, so nothing is guessed yet. Sample under no_grad().")
            return
        transformer = self.transformer
        assert transformer is not None
        pipelines = [link.pipeline for link in self.clock.links if link.pipeline is not None]
        context, explicit = self.clock.context, self.clock.explicit
        self.uninstall(transformer)
        inputs = named_inputs(parameters_of(transformer), args, kwargs)
        try:
            controller = api.build_controller(
                transformer, self.config, guess_backbone(transformer, inputs)
            )
        except AdapterError as error:
            raise AdapterError(f"{error} The cache was taken off again.") from error
        for pipeline in pipelines:
            controller.clock.attach(pipeline, fresh=True)
        controller.install(transformer)
        # A skip_cache_run under way, and a named pass, go on with the new controller.
        self.clock.explicit = controller.clock.explicit = explicit
        if context is not None and controller.clock.context is not None:
            controller.clock.context.name = context.name
        controller.before(args, kwargs)
