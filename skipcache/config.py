"""The configuration of a cache: three independent answers to where, when and what, validated at
once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from skipcache.errors import ConfigError
from skipcache.estimators import Estimator, estimator_named
from skipcache.presets import preset_named
from skipcache.schedules import IntervalSchedule, Schedule

DEFAULT_INTERVAL = 2
DEFAULT_WINDOW = (0.98, 0.02)


@dataclass(frozen=True)
class SkipCacheConfig:
    """Where, when and what. Immutable; ``None`` means the default.

    Attributes:
        interval: refresh every so many steps; default 2. Short for
            ``schedule=IntervalSchedule(...)``.
        window: (start, stop) of the interval schedule in normalised time, 1 = noise; default (0.98,
            0.02).
        front_layers: layers at the front that always run, at least 0; default 1.
        back_layers: layers at the back that always run, at least 0; default 1. With 0 it is the
            transformer's output that is kept and estimated, by ``"taylor"`` unless said otherwise.
        schedule: when, instead of ``interval`` and ``window``.
        estimator: what: ``"hold"``, ``"residual"``, ``"taylor"``, ``"taylor(2)"``, or an
            ``Estimator``. Default: ``"hold"`` where the model has skip branches, else the fit that
            comes with the model, else ``"taylor(2)"`` (docs/explanation/defaults.md).
        preset: name of the settings that fill in window, layers and estimator where they are None
            here (``skipcache.presets``). Default: the model's own, where it has working skip
            branches and none of the fields above but ``interval`` is set.

    Raises:
        ConfigError: a value that cannot be, a preset that does not exist, or ``schedule`` together
            with ``interval`` or ``window``.
    """

    interval: int | None = None
    window: tuple[float, float] | None = None
    front_layers: int | None = None
    back_layers: int | None = None
    schedule: Schedule | None = None
    estimator: str | Estimator | None = None
    preset: str | None = None

    def __post_init__(self) -> None:
        if self.schedule is not None and (self.interval is not None or self.window is not None):
            raise ConfigError(
                "schedule and interval/window both say when to refresh. Pass one: interval and "
                "window, or a schedule."
            )
        _check_layers("front_layers", self.front_layers, at_least=0)
        _check_layers("back_layers", self.back_layers, at_least=0)
        if self.preset is not None:
            preset_named(self.preset)
        self.resolve_schedule()
        self.resolve_estimator(has_branches=False)

    def resolve_preset(self, own: str | None, depth: int) -> SkipCacheConfig:
        """This configuration with the values of a preset where it has none.

        Args:
            own: name of the model's preset, taken where nothing is set here but ``interval``; None
                for a model without.
            depth: layers of the model, L. Where the preset's layers leave nothing to skip, one at
                the front and one at the back take their place.

        Returns:
            The configuration to resolve, ``preset`` naming the preset that is in use.
        """
        set_here = (self.window, self.front_layers, self.back_layers, self.schedule, self.estimator)
        name = self.preset
        if name is None and all(value is None for value in set_here):
            name = own
        if name is None:
            return self
        preset = preset_named(name)
        front = preset.front_layers if self.front_layers is None else self.front_layers
        back = preset.back_layers if self.back_layers is None else self.back_layers
        is_too_shallow = front + back >= depth
        return replace(
            self,
            preset=name,
            window=preset.window if self.window is None and self.schedule is None else self.window,
            front_layers=self.front_layers if is_too_shallow else front,
            back_layers=self.back_layers if is_too_shallow else back,
            estimator=preset.estimator if self.estimator is None else self.estimator,
        )

    def resolve_schedule(self) -> Schedule:
        """The schedule to use, defaults filled in."""
        if self.schedule is not None:
            if not isinstance(self.schedule, Schedule) or isinstance(self.schedule, type):
                raise ConfigError(
                    f"schedule is {self.schedule!r}. Pass an IntervalSchedule, MaskSchedule or "
                    "ProbeSchedule, or an "
                    "object with needs_probe, needs_times, is_refresh and plan."
                )
            return self.schedule
        window = DEFAULT_WINDOW if self.window is None else self.window
        if not isinstance(window, (tuple, list)) or len(window) != 2:
            raise ConfigError(
                f"window is {window!r}. It is a pair (start, stop) of normalised times, for "
                "example (0.9, 0.05)."
            )
        interval = DEFAULT_INTERVAL if self.interval is None else self.interval
        return IntervalSchedule(interval, *window)

    def resolve_estimator(self, *, has_branches: bool) -> Estimator:
        """The estimator to use; the default depends on whether the model has skip branches."""
        estimator = self.estimator
        if estimator is None:
            without_branches = "taylor" if self.back_layers == 0 else "taylor(2)"
            estimator = "hold" if has_branches else without_branches
        if isinstance(estimator, str):
            return estimator_named(estimator)
        if not isinstance(estimator, Estimator) or isinstance(estimator, type):
            raise ConfigError(
                f"estimator is {estimator!r}. Pass a name ('hold', 'residual', 'taylor', "
                "'taylor(2)') or an object with "
                "history, needs_shallow, prepare and estimate."
            )
        return estimator

    def resolve_layers(self, depth: int) -> tuple[int, int]:
        """Front and back layers for a model of that depth.

        Raises:
            ConfigError: they leave no layer between them to skip.
        """
        front = 1 if self.front_layers is None else self.front_layers
        back = 1 if self.back_layers is None else self.back_layers
        if front + back >= depth:
            raise ConfigError(
                f"front_layers={front} and back_layers={back} leave nothing to skip in a model of "
                f"{depth} layers. "
                f"Their sum must be below {depth}."
            )
        return front, back


def _check_layers(name: str, value: int | None, at_least: int) -> None:
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise ConfigError(
            f"{name} is {value!r}. It is a whole number of layers, at least {at_least}."
        )
