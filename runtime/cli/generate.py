"""``calotype generate``."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

import click


@click.command("generate")
@click.argument("prompt")
@click.option(
    "-m", "--model", default="talbot", show_default=True, help="A bundled model's name, or a bundle's folder."
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("calotype.png"),
    show_default=True,
    help="A picture file.",
)
@click.option("-n", "--negative-prompt", default="", help="What to steer away from.")
@click.option("--steps", type=int, help="Denoising steps.  [default: the model's]")
@click.option(
    "--guidance-scale", type=float, help="How strictly to follow the prompt; off at 1.  [default: the model's]"
)
@click.option("--seed", type=int, help="0 to 2**64-1; the same seed gives the same picture.  [default: random]")
@click.option("--width", type=int, help="Pixels.  [default: the model's]")
@click.option("--height", type=int, help="Pixels.  [default: the model's]")
@click.option("--images", type=int, default=1, show_default=True, help="How many, with consecutive seeds.")
@click.option("--scheduler", help="ddim, ddpm, dpmpp-2m or euler.  [default: the model's]")
@click.option("--backend", default="auto", show_default=True, help="auto or cpu.")
@click.option("--overwrite", is_flag=True, help="Replace a picture of that name.")
@click.option("--json", "as_json", is_flag=True, help="Print paths, seeds and timings as JSON.")
def command(
    prompt: str,
    model: str,
    output: Path,
    negative_prompt: str,
    steps: int | None,
    guidance_scale: float | None,
    seed: int | None,
    width: int | None,
    height: int | None,
    images: int,
    scheduler: str | None,
    backend: str,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Draw PROMPT. Pictures that exist are kept: another gets a number in its name."""
    from calotype.runtime.images import Parameters, check_target, numbered_paths, save_image
    from calotype.runtime.pipeline import Pipeline, StepEnd
    from calotype.runtime.schedulers import scheduler_name

    check_target(output)  # before the work, not after it
    with Pipeline.load(model, backend) as pipeline, contextlib.ExitStack() as stack:
        defaults = pipeline.manifest.defaults
        total = (defaults.num_inference_steps if steps is None else steps) * images
        bar = stack.enter_context(
            click.progressbar(length=max(total, 1), label="denoising", file=sys.stderr, hidden=not sys.stderr.isatty())
        )

        def advance(_: StepEnd) -> None:
            bar.update(1)

        result = pipeline(
            prompt,
            negative_prompt=negative_prompt,
            height=height,
            width=width,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            num_images_per_prompt=images,
            seed=seed,
            scheduler=scheduler,
            callback_on_step_end=advance,
        )
    chosen = scheduler or defaults.scheduler or str(pipeline.manifest.scheduler.get("_class_name"))
    paths = numbered_paths(output, len(result.images), overwrite=overwrite)
    for image, path, image_seed in zip(result.images, paths, result.seeds, strict=True):
        parameters = Parameters(
            prompt=prompt,
            negative_prompt=negative_prompt,
            steps=defaults.num_inference_steps if steps is None else steps,
            sampler=scheduler_name(chosen),
            guidance_scale=defaults.guidance_scale if guidance_scale is None else guidance_scale,
            seed=image_seed,
            width=image.width,
            height=image.height,
            model=pipeline.manifest.name,
        )
        save_image(image, path, parameters, overwrite=overwrite)
    if as_json:
        files = [{"path": str(path), "seed": s} for path, s in zip(paths, result.seeds, strict=True)]
        click.echo(json.dumps({"images": files, "backend": pipeline.backend, "timings": result.timings}))
    else:
        for path in paths:
            click.echo(str(path))
