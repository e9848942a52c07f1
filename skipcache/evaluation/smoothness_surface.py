"""How smooth a model is in its weights: the predicted noise under random perturbations, as a
surface (arXiv:2411.17616, stability analysis; directions as in arXiv:1712.09913, section 4).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn

from skipcache.backbone import Backbone
from skipcache.errors import ConfigError
from skipcache.evaluation.smoothness import (
    Array,
    StepWatch,
    find_transformer,
    sample,
    similarity_of,
    write_csv,
)

Call: TypeAlias = "tuple[tuple[Any, ...], dict[str, Any]]"
Move: TypeAlias = Callable[[float, float], None]

DEFAULT_GRID = 15
KEPT_DIRECTIONS_BYTES = 256 * 2**20  # directions of a small model are drawn once and kept


@dataclass(frozen=True, eq=False)
class Surface:
    """Similarity of the predicted noise to that of the unperturbed model, over two directions.

    Attributes:
        alphas: [G], lengths along the first direction; 1 = as long as the weights, filter by
            filter.
        betas: [G], along the second.
        similarity: [G, G], mean cosine similarity; rows are alphas, columns betas. NaN where the
            perturbed model gave numbers that are not finite.
        step: the step whose input was used.
        time: its normalised time, 1 = noise.
    """

    alphas: Array
    betas: Array
    similarity: Array
    step: int
    time: float

    def save_csv(self, folder: str | Path, name: str = "surface") -> Path:
        """Writes ``name.csv``: alpha, beta, similarity.

        Args:
            folder: created if need be.
            name: of the file, without its ending.
        """
        rows = (
            (self.alphas[i], self.betas[j], value)
            for (i, j), value in np.ndenumerate(self.similarity)
        )
        return write_csv(Path(folder) / f"{name}.csv", ("alpha", "beta", "similarity"), rows)


def perturbation_surface(
    pipe: Any,
    call: Mapping[str, Any],
    *,
    step: int | None = None,
    grid: int = DEFAULT_GRID,
    span: float = 1.0,
    seed: int = 0,
    adapter: str | Backbone | object | None = None,
    component: str = "transformer",
    progress: Callable[[], object] | None = None,
) -> Surface:
    """Perturbs the transformer's weights to theta + alpha delta + beta eta on a grid, and compares.

    Both directions are Gaussian, each filter scaled to the norm of the weight's filter
    (``filter_direction``). Perturbed are the weights of Linear and convolution layers, skip
    branches included; biases, norms and embeddings are not. A weight of one name in two models gets
    one direction. Afterwards, and after an exception, the weights are those of before, bit for bit.
    Beside the model one copy of those weights is held, and of a small model both directions.

    Args:
        pipe: a diffusers pipeline, compiled or not. It is called once, uncached, to learn what its
            transformer is given at ``step``.
        call: keywords of the one call, ``pipe(**call)``.
        step: index of the step, from 0; default: the middle one.
        grid: points along each direction, at least 2; an odd number has the unperturbed model in
            its middle.
        span: largest alpha and beta; both run from -span to span.
        seed: of the noise, where ``call`` brings no generator, and of the directions.
        adapter: the name of an adapter, a ``Backbone``, or a plugin; default: the adapter that
            claims the model.
        component: name of the transformer in the pipeline.
        progress: called after every point; there are ``grid ** 2``.

    Raises:
        ConfigError: a setting that cannot be, a cache that is applied, a step that the run does not
            have, or weights that cannot be perturbed (quantised, or offloaded layer by layer).
        TargetError: the pipeline has no such transformer.
        AdapterError: no adapter claims the model (``NoAdapterError``), or it does not fit.
    """
    check_settings(step, grid, span)
    transformer, bound = find_transformer(pipe, component, adapter)
    weights = _weights_of(transformer)
    watch = StepWatch(pipe, transformer, bound)
    calls, step = _record_calls(pipe, call, step, seed, watch)
    # Exactly 0 in the middle, which linspace is not for every span.
    axis = span * np.arange(1 - grid, grid, 2) / (grid - 1)
    values = np.empty((grid, grid))
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        unperturbed = [_predicted_noise(transformer, each) for each in calls]
        with _movable(weights, seed) as move:
            for i, j in np.ndindex(grid, grid):
                move(float(axis[i]), float(axis[j]))
                similar = [
                    similarity_of(_predicted_noise(transformer, each), expected)
                    for each, expected in zip(calls, unperturbed, strict=True)
                ]
                values[i, j] = torch.stack(similar).mean().item()
                if progress is not None:
                    progress()
    return Surface(axis, axis.copy(), values, step, watch.times[step])


def check_settings(step: object, grid: object, span: object) -> None:
    """Refuses settings of a surface that cannot be.

    Raises:
        ConfigError: with what is allowed.
    """
    if not isinstance(grid, int) or isinstance(grid, bool) or grid < 2:
        raise ConfigError(f"grid is {grid!r}. It is the points along each direction, at least 2.")
    if not isinstance(span, (int, float)) or not (math.isfinite(span) and span > 0):
        raise ConfigError(f"span is {span!r}. It is the largest perturbation, above 0; 1 is usual.")
    if step is not None and (not isinstance(step, int) or isinstance(step, bool) or step < 0):
        raise ConfigError(f"step is {step!r}. It is the index of a denoising step, from 0.")


def filter_direction(weight: torch.Tensor, name: str, axis: int, seed: int) -> torch.Tensor:
    """A Gaussian direction, each filter of which has the norm of the weight's filter.

    d[i] <- d[i] / ||d[i]|| * ||w[i]|| for each output i (arXiv:1712.09913, equation 1).

    Args:
        weight: [out, in, ...].
        name: of the weight in the model: with axis and seed it determines the draw.
        axis: 0 for delta, 1 for eta.
        seed: of both directions.

    Returns:
        fp32, of the weight's shape and on its device.
    """
    digest = hashlib.sha256(f"{seed}/{axis}/{name}".encode()).digest()
    generator = torch.Generator(weight.device).manual_seed(int.from_bytes(digest[:7], "big"))
    drawn = torch.randn(weight.shape, generator=generator, device=weight.device)
    dims = tuple(range(1, weight.dim()))
    norms = torch.linalg.vector_norm(weight.detach().float(), dim=dims, keepdim=True)
    return drawn.mul_(norms / torch.linalg.vector_norm(drawn, dim=dims, keepdim=True))


def _record_calls(
    pipe: Any, call: Mapping[str, Any], step: int | None, seed: int, watch: StepWatch
) -> tuple[list[Call], int]:
    """What the transformer is given at that step, one call a guidance pass; and the step."""
    calls: list[Call] = []

    def wanted() -> int:
        return len(watch.times) // 2 if step is None else step

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if watch.is_watching and watch.step == wanted():
            calls.append((_copied(args), _copied(kwargs)))

    with watch:  # its hook comes first
        handle = watch.transformer.register_forward_pre_hook(record, with_kwargs=True)
        try:
            sample(pipe, call, seed)
        finally:
            handle.remove()
    if not calls:
        raise ConfigError(
            f"{type(pipe).__qualname__!r} did not call this transformer at step {wanted()}; its "
            f"run had {len(watch.times)} steps, counted from 0. Choose a smaller step, or more "
            "steps."
        )
    return calls, wanted()


def _copied(value: Any) -> Any:
    """The value with every tensor in it copied, so that the sampler cannot write into it."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_copied(item) for item in value)
    return value


def _predicted_noise(transformer: nn.Module, call: Call) -> torch.Tensor:
    """What the transformer predicts; without the variances where it predicts them too."""
    args, kwargs = call
    output = transformer(*args, **kwargs)
    noise: torch.Tensor = output if isinstance(output, torch.Tensor) else output[0]
    channels = getattr(getattr(transformer, "config", None), "in_channels", None)
    has_variances = noise.dim() >= 4 and channels is not None and noise.shape[1] == 2 * channels
    return noise[:, :channels] if has_variances else noise


def _weights_of(transformer: nn.Module) -> dict[str, nn.Parameter]:
    """Weights of Linear and convolution layers by name, a shared one once.

    Raises:
        ConfigError: there are none in floating point, or some are not in memory.
    """
    filtered = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    found: dict[str, nn.Parameter] = {}
    for name, module in transformer.named_modules():  # each module once
        weight = module._parameters.get("weight") if isinstance(module, filtered) else None
        if weight is not None and not any(weight is other for other in found.values()):
            found[f"{name}.weight"] = weight
    kind = type(transformer).__qualname__
    if not found:
        raise ConfigError(f"{kind!r} has no Linear or convolution layer, so no weights to perturb.")
    for name, weight in found.items():
        if not weight.is_floating_point():
            raise ConfigError(
                f"{name!r} of {kind!r} is quantised ({weight.dtype}) and cannot be perturbed. Load "
                "the model in floating point."
            )
        if weight.is_meta:
            raise ConfigError(
                f"{name!r} of {kind!r} is offloaded and cannot be perturbed. Offload whole models "
                "(enable_model_cpu_offload), or none."
            )
    return found


@contextmanager
def _movable(weights: Mapping[str, nn.Parameter], seed: int) -> Iterator[Move]:
    """Yields a function that moves the weights to (alpha, beta); puts them back at the end."""
    base = {name: weight.detach().clone() for name, weight in weights.items()}
    drawn_bytes = 2 * 4 * sum(weight.numel() for weight in base.values())
    kept: dict[tuple[str, int], torch.Tensor] = {}

    def direction(name: str, axis: int) -> torch.Tensor:
        # Of the copy, which stays on its device where offloading moves the weight.
        if (name, axis) in kept:
            return kept[name, axis]
        drawn = filter_direction(base[name], name, axis, seed)
        if drawn_bytes <= KEPT_DIRECTIONS_BYTES:
            kept[name, axis] = drawn
        return drawn

    def move(alpha: float, beta: float) -> None:
        for name, weight in weights.items():
            moved = base[name]
            for axis, length in enumerate((alpha, beta)):
                if length != 0:  # at 0 the weights are exactly the unperturbed ones
                    moved = torch.add(moved.float(), direction(name, axis), alpha=length)
            weight.copy_(moved)

    try:
        yield move
    finally:
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(base[name])
