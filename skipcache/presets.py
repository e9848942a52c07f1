"""Named settings with their source: the windows that the paper's released code samples with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from skipcache.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Preset:
    """Where, when and what, as somebody used them on a model that they had trained for it.

    How often to refresh is not part of it: the paper uses intervals from 2 to 6.

    Attributes:
        window: (start, stop) in normalised time, 1 = noise.
        front_layers: layers at the front that always run.
        back_layers: layers at the back that always run.
        source: a sentence on where the values are from.
        estimator: name of the estimator.
    """

    window: tuple[float, float]
    front_layers: int
    back_layers: int
    source: str
    estimator: str = "hold"


_CODE = "the released code of arXiv:2411.17616"

PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "skip-dit/dit-xl": Preset(
            (1.0, 0.02), 4, 4, f"Class to image, DiT-XL/2, timesteps 1000 to 20: {_CODE}."
        ),
        "skip-dit/hunyuan": Preset(
            (0.7, 0.05), 1, 1, f"Text to image, HunyuanDiT, timesteps 700 to 50: {_CODE}."
        ),
        # That code goes on reusing at timestep 50 itself, and stops below it.
        "skip-dit/latte-c2v": Preset(
            (0.9, 0.049), 1, 1, f"Class to video, Latte, timesteps 900 to 50: {_CODE}."
        ),
        "skip-dit/latte-t2v": Preset(
            (0.7, 0.05), 1, 1, f"Text to video, Latte, timesteps 700 to 50: {_CODE}."
        ),
    }
)


def preset_named(name: str) -> Preset:
    """The preset of that name.

    Raises:
        ConfigError: there is none.
    """
    if not isinstance(name, str) or name not in PRESETS:
        raise ConfigError(f"no preset is named {name!r}. {did_you_mean(str(name), PRESETS)}")
    return PRESETS[name]
