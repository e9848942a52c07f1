"""``skipcache bench``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from skipcache.cli.factory import imported
from skipcache.errors import ConfigError


def add_to(commands: Any) -> None:
    """Registers the command."""
    parser = commands.add_parser(
        "bench",
        help="measure speed and quality of caching methods, ours and others', on a pipeline",
        description="Samples a pipeline uncached and by every method from the same noise, times "
        "them in turns, and writes results.json, results.csv and pictures. A run that was stopped "
        "goes on where it was. Make a page of it: skipcache report FOLDER.",
    )
    add_subject_arguments(parser)
    parser.add_argument("--out", type=Path, help="folder of the results; default: bench-SUBJECT")
    parser.add_argument("--quick", action="store_true", help="few settings, samples and steps")
    parser.add_argument("--no-rivals", action="store_true", help="our methods and fewer steps only")
    parser.add_argument(
        "--only", nargs="+", metavar="TEXT", help="of the methods, those that have it in their name"
    )
    parser.add_argument(
        "--samples", type=int, help="compared with the uncached ones; default 64, quick 20"
    )
    parser.add_argument(
        "--judged", type=int, help="for Fréchet distance and accuracy; default: as --samples"
    )
    parser.add_argument("--repeats", type=int, help="timed runs a method; default 3, quick 1")
    parser.add_argument("--reference", metavar="FOLDER", help="real pictures, with --features")
    parser.add_argument(
        "--features",
        metavar="MODULE:FUNCTION",
        help="a function of pictures [N, C, H, W] in 0..1 to features [N, D]",
    )
    parser.add_argument("--clip", metavar="FOLDER", help="a CLIP model, for the CLIP score")
    parser.set_defaults(run=run)


def add_subject_arguments(parser: argparse.ArgumentParser) -> None:
    """What is sampled, the same for every command that samples a pipeline."""
    parser.add_argument(
        "subject",
        metavar="PIPELINE",
        help="a pipeline's folder or hub id, or a demo: demo, class-to-image, class-to-video, "
        "text-to-image, text-to-video",
    )
    parser.add_argument("--steps", type=int, help="denoising steps; default 50 (bench --quick: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise; default: %(default)s")
    parser.add_argument("--guidance-scale", type=float, help="default: the pipeline's own")
    parser.add_argument("--batch-size", type=int, help="samples a call")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="one a line")
    parser.add_argument("--labels", type=int, nargs="+", help="class labels")
    parser.add_argument(
        "--call", type=json.loads, default={}, metavar="JSON", help="more arguments of the call"
    )
    parser.add_argument("--device", help="default: a GPU if there is one")


def subject_of(arguments: argparse.Namespace, **options: Any) -> Any:
    """Loads what the arguments name.

    Raises:
        ConfigError: a file of prompts without any, or ``--call`` that is no object.
    """
    from skipcache.evaluation.bench.subjects import load_subject

    prompt = getattr(arguments, "prompt", None)
    prompts = [prompt] if prompt is not None else None
    if arguments.prompts is not None:
        lines = arguments.prompts.read_text(encoding="utf-8").splitlines()
        prompts = [line.strip() for line in lines if line.strip()]
        if not prompts:
            raise ConfigError(f"{arguments.prompts} holds no prompts.")
    if not isinstance(arguments.call, dict):
        raise ConfigError(f"--call is {arguments.call!r}. It is a JSON object of arguments.")
    return load_subject(
        arguments.subject,
        prompts=prompts,
        labels=arguments.labels,
        guidance_scale=arguments.guidance_scale,
        batch_size=arguments.batch_size,
        call=arguments.call,
        device=arguments.device,
        **options,
    )


def run(arguments: argparse.Namespace) -> int:
    """Measures, and prints the table."""
    from tqdm import tqdm

    from skipcache.evaluation.bench.grid import all_methods, missing_packages
    from skipcache.evaluation.bench.run import Plan, run_bench
    from skipcache.evaluation.report.report import markdown_table

    quick = arguments.quick
    samples = _or(arguments.samples, 20 if quick else 64)
    plan = Plan(
        samples=samples,
        judged=_or(arguments.judged, samples),
        repeats=_or(arguments.repeats, 1 if quick else 3),
        seed=arguments.seed,
    )
    subject = subject_of(
        arguments,
        steps=_or(arguments.steps, 20 if quick else None),
        reference=arguments.reference,
        features=None if arguments.features is None else imported(arguments.features),
        clip_folder=arguments.clip,
    )
    if not arguments.no_rivals and (missing := missing_packages()):
        print(f"Not installed, and left out: {', '.join(missing)}.", file=sys.stderr)
    methods = all_methods(
        subject, quick=quick, with_rivals=not arguments.no_rivals, seed=arguments.seed
    )
    if arguments.only:
        wanted = [text.lower() for text in arguments.only]
        keys = [f"{m.family} / {m.name} / {m.setting}" for m in methods]
        named = zip(methods, keys, strict=True)
        methods = [m for m, key in named if any(text in key.lower() for text in wanted)]
        if not methods:
            raise ConfigError(f"no method has {arguments.only} in its name: {keys}")
    out = arguments.out or Path(f"bench-{Path(subject.name).name}")
    command = ("skipcache", *sys.argv[1:])
    with tqdm(total=len(methods) + 1 + plan.repeats, unit="part") as bar:

        def progress(text: str) -> None:
            bar.set_postfix_str(text)
            bar.update()

        try:
            results = run_bench(subject, methods, out, plan, command=command, progress=progress)
        except KeyboardInterrupt:
            print(f"\nStopped. {out} keeps what was measured; run again to go on.", file=sys.stderr)
            return 130
    print(f"\n{markdown_table(results)}\n\nResults: {out}. A page: skipcache report {out}")
    return 0


def _or(value: int | None, default: Any) -> Any:
    return default if value is None else value
