"""Runs every method on one subject: quality first, a cell at a time, then times in turns. What is
measured is on the disk at once; a run that was stopped goes on from there.
"""

from __future__ import annotations

import copy
import dataclasses
import datetime
import gc
import importlib.metadata
import json
import platform
import statistics
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from skipcache import api
from skipcache.errors import ConfigError
from skipcache.evaluation.bench import quality
from skipcache.evaluation.bench.methods import UNCACHED, Method, Unavailable
from skipcache.evaluation.bench.pictures import save_picture
from skipcache.evaluation.bench.results import RESULTS_FILE, Cell, Results
from skipcache.evaluation.bench.subjects import Subject
from skipcache.evaluation.bench.tracks import track_of
from skipcache.evaluation.timing import DenoisingTimer

UNCACHED_EVERY = 4  # methods after which the uncached run is timed anew, within a turn
SAMPLES_FILE = "uncached.safetensors"
PACKAGES = ("skipcache", "torch", "diffusers", "cache-dit", "torchmetrics", "transformers")


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        samples: compared with the uncached ones, of the same noise.
        judged: samples for Fréchet distance and accuracy, at least ``samples``.
        repeats: timed runs a method; its samples come before, and are the warm-up.
        seed: of the noise.
        shown: samples that are saved as pictures.
    """

    samples: int = 64
    judged: int = 64
    repeats: int = 3
    seed: int = 0
    shown: int = 4

    def __post_init__(self) -> None:
        for name in ("samples", "repeats"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}. At least one is needed.")


def run_bench(
    subject: Subject,
    methods: Sequence[Method],
    out: str | Path,
    plan: Plan,
    *,
    command: Sequence[str] = (),
    progress: Callable[[str], object] = lambda text: None,
) -> Results:
    """Measures, and keeps ``out`` up to date; measurements that lie there already are taken over.

    Args:
        subject: what is sampled.
        methods: all that are compared; the uncached one need not be among them.
        out: the folder of the results.
        plan: how much.
        command: exact arguments, for the record.
        progress: told what was done, a text at a time.

    Returns:
        The results. A method that failed, or cannot run, is a cell that says so.

    Raises:
        ConfigError: ``out`` holds results of something else.
        KeyboardInterrupt: after what was measured is on the disk.
    """
    out = Path(out)
    bench = _Bench(subject, out, plan, tuple(command))
    methods = [UNCACHED, *(method for method in methods if method != UNCACHED)]
    for method in methods:
        if not bench.has_quality(method):
            bench.judge(method)
            progress(f"{method.family} {method.name} {method.setting}")
    bench.time(methods, progress)
    return bench.results


class _Bench:
    def __init__(self, subject: Subject, out: Path, plan: Plan, command: tuple[str, ...]) -> None:
        self.subject, self.out, self.plan = subject, out, plan
        self.cells: dict[str, Cell] = {}
        self.uncached: dict[str, torch.Tensor] = {}
        about = _about(subject, plan)
        created = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        if (out / RESULTS_FILE).exists():
            earlier = Results.load(out)
            if earlier.subject != about:
                changed = sorted(k for k in about if earlier.subject.get(k) != about[k])
                raise ConfigError(
                    f"{out} holds results of something else ({', '.join(changed)} differ). Choose "
                    "another folder, or delete it."
                )
            self.cells = {cell.key: cell for cell in earlier.cells}
            created = earlier.created
        self._head = Results(about, _machine(subject), _versions(), command, created)
        if (out / SAMPLES_FILE).exists():
            from safetensors.torch import load_file

            self.uncached = load_file(out / SAMPLES_FILE)

    @property
    def results(self) -> Results:
        return dataclasses.replace(self._head, cells=tuple(self.cells.values()))

    def has_quality(self, method: Method) -> bool:
        cell = self.cells.get(_key(method))
        if method == UNCACHED and not self.uncached:
            return False
        return cell is not None and (cell.psnr is not None or cell.status == "unavailable")

    def judge(self, method: Method) -> None:
        """One cell's quality, layers and memory."""
        options = json.loads(json.dumps(dict(method.options)))  # as it will be read back
        cell = Cell(method.family, method.name, method.setting, options)
        try:
            cell = self._judged(method, cell)
        except Unavailable as reason:
            cell = dataclasses.replace(cell, status="unavailable", message=str(reason))
        except Exception as error:  # of a rival, or out of memory: the others go on
            cell = dataclasses.replace(cell, status="failed", message=_message(error))
            _let_go()
        self._put(cell)

    def _put(self, cell: Cell) -> None:
        self.cells[cell.key] = cell
        self.results.save(self.out)

    def _judged(self, method: Method, cell: Cell) -> Cell:
        subject, plan = self.subject, self.plan
        batches = subject.batches(max(plan.samples, plan.judged))
        pictures, latents = [], []
        with self._pipeline(method) as pipeline:
            track = track_of(pipeline.transformer)
            with method.applied(pipeline, self._steps(method)):
                for batch in batches:
                    found = self._sample(pipeline, method, batch)
                    pictures.append(found[0])
                    latents.append(found[1])
                    if batch.start == 0 and not torch.equal(
                        self._sample(pipeline, method, batch)[0], found[0]
                    ):
                        cell = dataclasses.replace(cell, is_repeatable=False)
                if cell.is_repeatable is None:
                    cell = dataclasses.replace(cell, is_repeatable=True)
                with track.following() if track else nullcontext(), _peak_memory(subject) as peak:
                    self._sample(pipeline, method, batches[0])
                if track is not None:
                    ran = sum(sum(call) for call in track.calls)
                    cell = dataclasses.replace(
                        cell, ran=track.ran, layers_run=ran, layers_total=self._total(method, ran)
                    )
                cell = dataclasses.replace(
                    cell, peak_bytes=peak[0], cache_bytes=_cache_bytes(method, pipeline)
                )
        return self._compared(method, cell, torch.cat(pictures), torch.cat(latents))

    def _total(self, method: Method, ran: int) -> int | None:
        if method == UNCACHED:
            return ran
        uncached = self.cells.get(_key(UNCACHED))
        return uncached.layers_total if uncached is not None else None

    def _compared(
        self, method: Method, cell: Cell, pictures: torch.Tensor, latents: torch.Tensor
    ) -> Cell:
        subject, plan = self.subject, self.plan
        features = subject.features.extract(pictures) if subject.features else None
        if method == UNCACHED:
            self.uncached = {"pictures": pictures, "latents": latents}
            if features is not None and subject.features is not None:
                value = quality.frechet_distance(features, subject.features)
                self.uncached["frechet"] = torch.tensor(value).double()
                distances = quality.bootstrap_distances(features, subject.features)
                self.uncached["bootstraps"] = distances
            from safetensors.torch import save_file

            self.out.mkdir(parents=True, exist_ok=True)
            save_file(
                {k: v.contiguous() for k, v in self.uncached.items()}, self.out / SAMPLES_FILE
            )
        due, count = self.uncached, plan.samples
        if len(pictures) != len(due["pictures"]):
            raise ConfigError(f"{len(pictures)} samples, and {len(due['pictures'])} uncached ones.")
        same = pictures[:count], due["pictures"][:count]
        cell = dataclasses.replace(
            cell,
            psnr=quality.psnr_of(*same),
            ssim=quality.ssim_of(*same),
            lpips=quality.lpips_of(*same),
            latent_error=quality.latent_error_of(latents[:count], due["latents"][:count]),
            pictures=self._save_pictures(method, pictures),
        )
        if features is not None and subject.features is not None:
            frechet = quality.frechet_of(
                features, float(due["frechet"]), due["bootstraps"], subject.features
            )
            cell = dataclasses.replace(cell, frechet=frechet)
        if subject.is_right is not None:
            right = subject.is_right(pictures, range(len(pictures)))
            cell = dataclasses.replace(cell, accuracy=float(right.double().mean()))
        if subject.clip_folder is not None:
            captions = [subject.captions[i % len(subject.captions)] for i in range(count)]
            score = quality.clip_score_of(same[0], captions, subject.clip_folder)
            cell = dataclasses.replace(cell, clip_score=score)
        return cell

    def _save_pictures(self, method: Method, pictures: torch.Tensor) -> tuple[str, ...]:
        stem = "".join(c if c.isalnum() else "-" for c in _key(method).lower()).strip("-")
        return tuple(
            save_picture(pictures[i], self.out, f"pictures/{stem}-{i}")
            for i in range(min(self.plan.shown, len(pictures)))
        )

    def time(self, methods: Sequence[Method], progress: Callable[[str], object]) -> None:
        """Seconds of every method that runs, in turns. The samples before were the warm-up; after a
        stop there is one of the uncached pipeline.
        """
        running = [m for m in methods if m != UNCACHED and self.cells[_key(m)].status == "ok"]
        done = min((len(self.cells[_key(m)].seconds) for m in running), default=0)
        if running and done < self.plan.repeats and self.cells[_key(UNCACHED)].seconds:
            self._seconds(UNCACHED)
        for turn in range(done, self.plan.repeats):
            uncached = float("nan")
            for i, method in enumerate(running):
                if i % UNCACHED_EVERY == 0:
                    uncached = self._seconds(UNCACHED)
                if len(self.cells[_key(method)].seconds) > turn:
                    continue
                try:
                    self._add_time(method, self._seconds(method), uncached)
                except Exception as error:
                    cell = self.cells[_key(method)]
                    self._put(dataclasses.replace(cell, status="failed", message=_message(error)))
                    _let_go()
            progress(f"turn {turn + 1} of times")

    def _add_time(self, method: Method, seconds: float, uncached: float) -> None:
        cell = self.cells[_key(method)]
        mine, theirs = (*cell.seconds, seconds), (*cell.baseline_seconds, uncached)
        ratios = [b / s for b, s in zip(theirs, mine, strict=True)]
        self._put(
            dataclasses.replace(
                cell,
                seconds=mine,
                baseline_seconds=theirs,
                speedup=statistics.median(ratios),
                speedup_low=min(ratios),
                speedup_high=max(ratios),
            )
        )
        own = self.cells[_key(UNCACHED)]
        self._put(
            dataclasses.replace(
                own,
                seconds=(*own.seconds, uncached),
                baseline_seconds=(*own.baseline_seconds, uncached),
                speedup=1.0,
                speedup_low=1.0,
                speedup_high=1.0,
            )
        )

    def _seconds(self, method: Method) -> float:
        batch = self.subject.batches(self.plan.samples)[0]
        with (
            self._pipeline(method) as pipeline,
            method.applied(pipeline, self._steps(method)),
            DenoisingTimer(pipeline) as timer,
        ):
            self._sample(pipeline, method, batch, is_timed=True)
        return timer.seconds

    def _steps(self, method: Method) -> int:
        return int(method.call.get("num_inference_steps", self.subject.steps))

    @contextmanager
    def _pipeline(self, method: Method) -> Iterator[Any]:
        """The subject's, or a copy for a method that may leave something behind."""
        if not method.spoils_pipeline:
            yield self.subject.pipeline
            return
        copied = copy.deepcopy(self.subject.pipeline)
        try:
            yield copied
        finally:
            del copied
            _let_go()

    def _sample(
        self, pipeline: Any, method: Method, batch: range, is_timed: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Pictures [N, C, H, W] or clips [N, F, C, H, W] in 0..1, and latents [N, ...], on the
        CPU in float.
        """
        call = {**self.subject.call_of(batch, self.plan.seed), **method.call}
        seen: list[torch.Tensor] = []
        vae = getattr(pipeline, "vae", None)
        handle = None
        if vae is not None and not is_timed:
            handle = vae.decoder.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                output = pipeline(**call, output_type="pt", return_dict=False)[0]
        finally:
            if handle is not None:
                handle.remove()
        pictures = torch.as_tensor(output).float().cpu()
        latents = torch.cat(seen).float().cpu() if seen else pictures
        return pictures, latents.reshape(len(pictures), -1)


def _key(method: Method) -> str:
    return Cell(method.family, method.name, method.setting).key


def _message(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:400]


def _let_go() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _cache_bytes(method: Method, pipeline: Any) -> int | None:
    if method.family != "skipcache":
        return 0 if method.family in ("uncached", "fewer steps") else None
    return api.cache_stats(pipeline).cache_bytes


@contextmanager
def _peak_memory(subject: Subject) -> Iterator[list[int]]:
    """A list that holds, after the block, the most bytes taken beyond what was held before it."""
    peak = [0]
    device = next(subject.pipeline.transformer.parameters()).device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak[0] = torch.cuda.max_memory_allocated(device) - before
        return
    import psutil

    process, ended = psutil.Process(), threading.Event()
    before = process.memory_info().rss

    def watch() -> None:
        while not ended.wait(0.005):
            peak[0] = max(peak[0], process.memory_info().rss - before)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        ended.set()
        watcher.join()


def _about(subject: Subject, plan: Plan) -> dict[str, Any]:
    pipeline = subject.pipeline
    track = track_of(pipeline.transformer)
    shown = [subject.captions[i % len(subject.captions)] for i in range(plan.shown)]
    call = {k: v for k, v in subject.call.items() if isinstance(v, (str, int, float, bool))}
    return {
        "name": subject.name,
        "pipeline": type(pipeline).__name__,
        "transformer": type(pipeline.transformer).__name__,
        "layers": track.depth if track is not None else None,
        "steps": subject.steps,
        "samples": plan.samples,
        "judged": max(plan.samples, plan.judged),
        "batch_size": subject.batch_size,
        "seed": plan.seed,
        "captions": shown,
        "call": call,
    }


def _machine(subject: Subject) -> dict[str, Any]:
    import psutil

    device = next(subject.pipeline.transformer.parameters()).device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "device": name,
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.release()}",
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
