"""Class-to-video sampling with ``LatteClassTransformer3DModel``."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import (  # noqa: TID253 (subclassed; imported on demand)
    AutoencoderKL,
    DiffusionPipeline,
    SchedulerMixin,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback  # noqa: TID253
from diffusers.utils import BaseOutput  # noqa: TID253
from diffusers.utils.torch_utils import randn_tensor  # noqa: TID253
from diffusers.video_processor import VideoProcessor  # noqa: TID253

from skipcache.errors import ConfigError
from skipcache.latte_class.transformer import LatteClassTransformer3DModel

_OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass
class LatteClassPipelineOutput(BaseOutput):  # type: ignore[misc]
    """What the pipeline returns.

    Attributes:
        frames: one video an entry: lists of PIL images ("pil"), [B, F, H, W, 3] in 0..1 ("np"),
            [B, F, 3, H, W] in 0..1 ("pt") or the latents, [B, C, F, h, w] ("latent").
    """

    frames: torch.Tensor | np.ndarray | list[list[PIL.Image.Image]]


class LatteClassPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Videos of given classes, or of none where the model is unconditional.

    >>> from diffusers.utils import export_to_video  # doctest: +SKIP
    >>> export_to_video(pipe(class_labels=3).frames[0], "video.mp4")  # doctest: +SKIP

    Args:
        transformer: predicts the noise.
        vae: decodes each frame.
        scheduler: any of diffusers' schedulers for noise, sample or velocity prediction.
    """

    model_cpu_offload_seq = "transformer->vae"
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012 (as in every diffusers pipeline)

    def __init__(
        self,
        transformer: LatteClassTransformer3DModel,
        vae: AutoencoderKL,
        scheduler: SchedulerMixin,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler)
        self.vae_scale_factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.video_processor = VideoProcessor(vae_scale_factor=self.vae_scale_factor)

    @property
    def guidance_scale(self) -> float:
        """Of the call under way."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Calls of the transformer in the call under way."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Set ``_interrupt`` in a callback to leave out the steps that are left."""
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | list[int] | torch.Tensor | None = None,
        num_videos_per_label: int = 1,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        video_length: int | None = None,
        height: int | None = None,
        width: int | None = None,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: (
            Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]
            | PipelineCallback
            | MultiPipelineCallbacks
            | None
        ) = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        decode_chunk_size: int = 14,
    ) -> LatteClassPipelineOutput | tuple[Any]:
        """Samples videos.

        Args:
            class_labels: the class of each video, or of all; the null class
                (``transformer.null_class``) for none. None for an unconditional model.
            num_videos_per_label: videos of each label, one after the other.
            num_inference_steps: denoising steps.
            guidance_scale: w of classifier-free guidance (arXiv:2207.12598); 1 for none.
            video_length: frames; default: as many as the model was trained on.
            height: in pixels; the model has one size, which is the default.
            width: in pixels, likewise.
            eta: η of DDIM (arXiv:2010.02502); other schedulers ignore it.
            generator: of the noise; one, or one for each video.
            latents: unit noise to start from, [B, C, F, h, w].
            output_type: "pil", "np", "pt" or "latent".
            return_dict: returns an object with ``.frames`` in place of a tuple.
            callback_on_step_end: called after each step as ``callback(pipe, i, t, tensors)``;
                returns the tensors, changed or not.
            callback_on_step_end_tensor_inputs: names of those tensors; "latents" is the only one.
            decode_chunk_size: frames that are decoded at a time.

        Returns:
            The videos; see ``LatteClassPipelineOutput``.

        Raises:
            ConfigError: an argument that model or scheduler cannot serve.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            tensor_inputs = callback_on_step_end.tensor_inputs
        else:
            tensor_inputs = callback_on_step_end_tensor_inputs or ["latents"]
        config = self.transformer.config
        side = config.sample_size * self.vae_scale_factor
        video_length = config.video_length if video_length is None else video_length
        self._check_inputs(
            height=side if height is None else height,
            width=side if width is None else width,
            video_length=video_length,
            guidance_scale=guidance_scale,
            output_type=output_type,
            tensor_inputs=tensor_inputs,
            counts={
                "num_videos_per_label": num_videos_per_label,
                "num_inference_steps": num_inference_steps,
                "decode_chunk_size": decode_chunk_size,
            },
        )
        label_list = self._label_list(class_labels)
        self._guidance_scale, self._interrupt = guidance_scale, False
        takes_variance = self._check_variance()

        device = self._execution_device
        batch = num_videos_per_label * (1 if label_list is None else len(label_list))
        labels = None
        if label_list is not None:
            labels = torch.tensor(label_list, device=device)
            labels = labels.repeat_interleave(num_videos_per_label, output_size=batch)

        self.scheduler.set_timesteps(num_inference_steps, device=device)
        timesteps = self.scheduler.timesteps
        self._num_timesteps = len(timesteps)
        shape = (batch, config.in_channels, video_length, config.sample_size, config.sample_size)
        latents = self._prepare_latents(shape, generator, latents, device)
        extra = {"eta": eta, "generator": generator}
        accepted = inspect.signature(self.scheduler.step).parameters
        extra = {name: value for name, value in extra.items() if name in accepted}

        warmup = max(len(timesteps) - num_inference_steps * self.scheduler.order, 0)
        with self.progress_bar(total=num_inference_steps) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                prediction = self._predict(latents, t, labels, takes_variance)
                latents = self.scheduler.step(prediction, t, latents, **extra, return_dict=False)[0]
                if callback_on_step_end is not None:
                    known = {"latents": latents}
                    tensors = {name: known[name] for name in tensor_inputs}
                    returned = callback_on_step_end(self, i, t, tensors)
                    latents = returned.pop("latents", latents)
                done = i + 1
                if done == len(timesteps) or (done > warmup and done % self.scheduler.order == 0):
                    progress_bar.update()

        if output_type == "latent":
            frames = latents
        else:
            pixels = self.decode_latents(latents, decode_chunk_size)
            frames = self.video_processor.postprocess_video(pixels, output_type=output_type)
        self.maybe_free_model_hooks()
        return LatteClassPipelineOutput(frames=frames) if return_dict else (frames,)

    def decode_latents(self, latents: torch.Tensor, decode_chunk_size: int = 14) -> torch.Tensor:
        """Decodes so many frames at a time.

        Args:
            latents: [B, C, F, h, w].
            decode_chunk_size: frames in a call of the decoder.

        Returns:
            float32 in -1..1, [B, 3, F, H, W].
        """
        batch = latents.shape[0]
        latents = latents.transpose(1, 2).flatten(0, 1).to(self.vae.dtype)
        chunks = (latents / self.vae.config.scaling_factor).split(decode_chunk_size)
        frames = torch.cat([self.vae.decode(chunk).sample for chunk in chunks])
        return frames.reshape(batch, -1, *frames.shape[1:]).transpose(1, 2).float()

    def _predict(
        self,
        latents: torch.Tensor,
        t: torch.Tensor,
        labels: torch.Tensor | None,
        takes_variance: bool,
    ) -> torch.Tensor:
        """What the scheduler is given: the guided prediction, and the variance if it wants it."""
        is_guided = labels is not None and self.guidance_scale > 1
        model_input = torch.cat([latents, latents]) if is_guided else latents
        model_input = self.scheduler.scale_model_input(model_input, t)
        if labels is not None and is_guided:
            null = torch.full_like(labels, self.transformer.null_class)
            labels = torch.cat([null, labels])
        timestep = torch.as_tensor(t, device=model_input.device).expand(len(model_input))
        output: torch.Tensor = self.transformer(
            model_input, timestep=timestep, class_labels=labels, return_dict=False
        )[0]
        # A learned variance follows in the channels, and is not guided.
        prediction, variance = output.tensor_split([latents.shape[1]], dim=1)
        if is_guided:
            unconditional, conditional = prediction.chunk(2)
            prediction = unconditional + self.guidance_scale * (conditional - unconditional)
            variance = variance.chunk(2)[1]
        return torch.cat([prediction, variance], dim=1) if takes_variance else prediction

    def _prepare_latents(
        self,
        shape: tuple[int, ...],
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        device: torch.device,
    ) -> torch.Tensor:
        if isinstance(generator, list) and len(generator) != shape[0]:
            raise ConfigError(
                f"{len(generator)} generators for {shape[0]} videos. Pass one, or one for each."
            )
        if latents is not None and tuple(latents.shape) != shape:
            raise ConfigError(f"latents of shape {tuple(latents.shape)}. This call needs {shape}.")
        dtype = self.transformer.dtype
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        noise: torch.Tensor = latents.to(device, dtype) * self.scheduler.init_noise_sigma
        return noise

    def _check_inputs(
        self,
        height: int,
        width: int,
        video_length: int,
        guidance_scale: float,
        output_type: str,
        tensor_inputs: list[str],
        counts: dict[str, int],
    ) -> None:
        config = self.transformer.config
        side = config.sample_size * self.vae_scale_factor
        if (height, width) != (side, side):
            raise ConfigError(
                f"height={height}, width={width}. The model makes videos of {side} by {side} "
                "pixels; leave both out."
            )
        if not 1 <= video_length <= config.video_length:
            raise ConfigError(
                f"video_length={video_length}. The model was made for 1 to {config.video_length} "
                "frames."
            )
        for name, count in counts.items():
            if count < 1:
                raise ConfigError(f"{name}={count}. It is at least 1.")
        if guidance_scale > 1 and self.transformer.null_class is None:
            raise ConfigError(
                f"guidance_scale={guidance_scale}, and the model has no null class to guide away "
                "from. Leave it at 1."
            )
        if output_type not in _OUTPUT_TYPES:
            raise ConfigError(f"output_type={output_type!r}. It is one of {_OUTPUT_TYPES}.")
        unknown = [name for name in tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ConfigError(
                f"callback_on_step_end_tensor_inputs {unknown} do not exist. Allowed: "
                f"{self._callback_tensor_inputs}."
            )

    def _label_list(self, labels: int | list[int] | torch.Tensor | None) -> list[int] | None:
        """The labels as numbers, checked here so that none has to be read back from a device."""
        num_classes, null = self.transformer.config.num_classes, self.transformer.null_class
        if not num_classes:
            if labels is not None:
                raise ConfigError(
                    f"class_labels={labels!r}, and the model is unconditional. Leave them out; "
                    "num_videos_per_label says how many videos."
                )
            return None
        hint = "" if null is None else f", or {null} for no class"
        allowed = f"Pass integers from 0 to {num_classes - 1}{hint}."
        if labels is None:
            raise ConfigError(f"class_labels are missing. {allowed}")
        given = labels.tolist() if isinstance(labels, torch.Tensor) else labels
        found = [given] if isinstance(given, int) else list(given)
        last = num_classes - 1 if null is None else null
        for label in found:
            if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label <= last:
                raise ConfigError(f"class label {label!r} does not exist. {allowed}")
        if not found:
            raise ConfigError(f"class_labels are empty. {allowed}")
        return found

    def _check_variance(self) -> bool:
        """Whether the scheduler wants the learned variance too.

        A setting left over from another scheduler's configuration says nothing, so its class is
        asked whether it knows the setting.
        """
        config, name = self.transformer.config, type(self.scheduler).__name__
        out_channels = self.transformer.out_channels
        is_learned = out_channels == 2 * config.in_channels
        knows = inspect.signature(type(self.scheduler).__init__).parameters
        setting = self.scheduler.config.get("variance_type") if "variance_type" in knows else None
        if setting not in ("learned", "learned_range"):
            return False
        advice = f"Build it with {name}.from_config(scheduler.config, variance_type=...)"
        if not is_learned:
            raise ConfigError(
                f"{name} has variance_type={setting!r}, and the model predicts no variance: "
                f"{out_channels} channels of {config.in_channels}. {advice} for a fixed one."
            )
        if "algorithm_type" in knows and config.in_channels != 3:
            raise ConfigError(
                f"{name} with variance_type={setting!r} keeps three channels of the prediction, "
                f"and the latents have {config.in_channels}. {advice} set to None."
            )
        return True
