"""``calotype generate``."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from calotype.runtime.denoising.acceleration import Acceleration
    from calotype.runtime.pictures.parameters import Parameters
    from calotype.runtime.pipeline import Output, Pipeline, StepEnd


class Numbers(click.ParamType[Any]):
    """Numbers with commas between them, or else, where there are names too, a name."""

    name = "number,…"

    def __init__(self, *, names: bool = False) -> None:
        self.names = names

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """A tuple of floats, or the name."""
        if isinstance(value, tuple):
            return value
        try:
            return tuple(float(item) for item in value.split(","))
        except ValueError:
            if self.names and value.replace("-", "").isalnum():
                return value
            self.fail(f"{value!r} is no number, and no numbers with commas between them", param, ctx)


def use_settings(ctx: click.Context, _: click.Parameter, path: Path | None) -> None:
    """Let the settings file say what the command line does not."""
    from calotype.runtime.cli.settings import read_settings
    from calotype.runtime.errors import InputError

    if path is None:
        return
    known: dict[str, click.Parameter] = {}
    for parameter in ctx.command.params:
        names = [option for option in parameter.opts if option.startswith("--")] or parameter.opts
        known |= {name.removeprefix("--"): parameter for name in names if parameter.name != "config"}
    defaults: dict[str, Any] = {}
    for name, value in read_settings(path, known).items():
        parameter = known[name]
        assert parameter.name is not None
        if getattr(parameter, "multiple", False):
            value = value if isinstance(value, list) else [value]
        elif isinstance(value, list) and parameter.nargs == 1:
            if not isinstance(parameter.type, Numbers):
                raise InputError(f"{path} has a list for {name}, which takes one value")
            value = ",".join(value)
        defaults[parameter.name] = value
    ctx.default_map = defaults


FILE = click.Path(path_type=Path)


@click.command("generate")
@click.argument("prompt")
@click.option(
    "-m", "--model", default="talbot", show_default=True, help="A bundled model's name, or a bundle's folder."
)
@click.option("-o", "--output", type=FILE, default=Path("calotype.png"), show_default=True, help="A picture file.")
@click.option("-n", "--negative-prompt", default="", help="What to steer away from.")
@click.option("--image", type=FILE, help="A picture to start from.")
@click.option("--strength", type=float, help="0 to 1, how much of it is given up.  [default: 0.8, with a mask 1]")
@click.option("--mask", type=FILE, help="A picture of its size, white where to draw; the rest comes back exactly.")
@click.option("--feather", type=int, default=0, help="Pixels inside the mask over which the two fade.")
@click.option("--steps", type=int, help="Denoising steps.  [default: the model's]")
@click.option(
    "--scheduler", help="ddim, euler, euler-a, dpmpp-2m, unipc, …; an unknown one lists all.  [default: the model's]"
)
@click.option(
    "--sigmas",
    type=Numbers(names=True),
    help="How noise levels are spaced (karras, exponential, …), or the levels themselves.",
)
@click.option("--karras", is_flag=True, help="The same as --sigmas karras.")
@click.option("--timesteps", type=Numbers(), help="The training timesteps to visit.")
@click.option("--eta", type=float, help="Noise that ddim and tcd add at each step, 0 to 1.")
@click.option(
    "--guidance-scale",
    type=Numbers(),
    help="How strictly to follow the prompt, for all or for each image; off at 1.  [default: the model's]",
)
@click.option("--guidance-rescale", type=float, default=0.0, help="0 to 1, against overexposure.")
@click.option(
    "--guidance-interval",
    type=float,
    nargs=2,
    metavar="LOW HIGH",
    help="Noise levels between which guidance is on.  [default: all]",
)
@click.option(
    "--fast", is_flag=True, help="Draw nearly the same picture in 60% of the steps, unless --steps says how many."
)
@click.option(
    "--cache-interval",
    type=int,
    help="Evaluate the whole UNet every so many times, and its last layer in between; exact at 1.",
)
@click.option(
    "--precision",
    type=click.Choice(["float32", "int8"]),
    help="int8: nearly the same picture from the engine that calotype build made so; with --fast where there is one.",
)
@click.option("--clip-skip", type=int, default=0, help="Last layers of the text encoder to leave out.")
@click.option("--original-size", type=int, nargs=2, metavar="HEIGHT WIDTH", help="SDXL's, before scaling.")
@click.option("--crops-coords-top-left", type=int, nargs=2, metavar="TOP LEFT", help="SDXL's crop.")
@click.option("--target-size", type=int, nargs=2, metavar="HEIGHT WIDTH", help="SDXL's, after scaling.")
@click.option("--seed", type=int, help="0 to 2**64-1; the same seed gives the same picture.  [default: random]")
@click.option("--width", type=int, help="Pixels.  [default: the picture's or the model's]")
@click.option("--height", type=int, help="Pixels.  [default: the picture's or the model's]")
@click.option("--images", type=int, default=1, show_default=True, help="How many, with consecutive seeds.")
@click.option(
    "--lora",
    "loras",
    multiple=True,
    metavar="FILE[:SCALE]",
    help="A LoRA to merge into the weights, 0.8 of it, say; can be given several times.",
)
@click.option(
    "--embedding",
    "embeddings",
    multiple=True,
    metavar="FILE[:WORD]",
    help="A textual inversion whose word the prompt may use; can be given several times.",
)
@click.option("--vae", help="A bundle whose autoencoder to use instead, such as a tiny one.")
@click.option("--vae-tiling", is_flag=True, help="Read and draw large pictures in tiles, in less memory.")
@click.option("--backend", default="auto", show_default=True, help="auto, tensorrt, tensorrt-rtx, cuda or cpu.")
@click.option("--low-memory", is_flag=True, help="Keep one network in memory at a time; slower.")
@click.option("--profile", is_flag=True, help="Say on stderr where the time went, with a backend of cpu by operator.")
@click.option("--overwrite", is_flag=True, help="Replace a picture of that name.")
@click.option("--json", "as_json", is_flag=True, help="Print paths, seeds and timings as JSON.")
@click.option(
    "--config",
    type=FILE,
    is_eager=True,
    expose_value=False,
    callback=use_settings,
    help="A TOML file that may say any of this; the command line wins.",
)
def command(prompt: str, model: str, output: Path, overwrite: bool, as_json: bool, **options: Any) -> None:
    """Draw PROMPT. Pictures that exist are kept: another gets a number in its name."""
    from calotype.runtime.pictures.writing import check_target, save_new
    from calotype.runtime.pipeline import Pipeline
    from calotype.runtime.sessions.profiled import Profile

    check_target(output)  # before the work, not after it
    profile = Profile() if options["profile"] else None
    begin = time.perf_counter()
    with Pipeline.load(
        model, options["backend"], low_memory=options["low_memory"], profile=profile, **_additions(options)
    ) as pipeline:
        result = _draw(pipeline, prompt, options)
        seconds = time.perf_counter() - begin
    paths = []
    for number, image in enumerate(result.images):
        own = _parameters(pipeline, prompt, options, result, number)
        counted = None if len(result.images) == 1 else number
        paths.append(save_new(image, output, own, number=counted, overwrite=overwrite))
    if profile is not None:
        click.echo(profile.text(result.timings, seconds), err=True)
    if as_json:
        files = [{"path": str(path), "seed": seed} for path, seed in zip(paths, result.seeds, strict=True)]
        more = {} if profile is None else {"profile": profile.to_json()}
        click.echo(json.dumps({"images": files, "backend": pipeline.backend, "timings": result.timings, **more}))
    else:
        for path in paths:
            click.echo(str(path))


def _additions(options: dict[str, Any]) -> dict[str, Any]:
    """What is added to the model when it is loaded."""
    from calotype.runtime.adapters.lora import Lora
    from calotype.runtime.pictures.autoencoder import Tiles
    from calotype.runtime.text.textual_inversion import Embedding

    return {
        "loras": [Lora.parse(text) for text in options["loras"]],
        "embeddings": [Embedding.parse(text) for text in options["embeddings"]],
        "vae": options["vae"],
        "vae_tiles": Tiles() if options["vae_tiling"] else None,
        "fast": _acceleration(options),
    }


def _acceleration(options: dict[str, Any]) -> Acceleration:
    from calotype.runtime.denoising.acceleration import EXACT, FAST

    preset = FAST if options["fast"] else EXACT
    given = {name: options[name] for name in ("cache_interval", "precision") if options[name] is not None}
    return dataclasses.replace(preset, **given)


def _draw(pipeline: Pipeline, prompt: str, options: dict[str, Any]) -> Output:
    scale, (spacing, levels) = options["guidance_scale"], _sigmas(options)
    config = {"sigma_spacing": spacing, "eta": options["eta"]}
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(
            click.progressbar(length=1, label="denoising", file=sys.stderr, hidden=not sys.stderr.isatty())
        )

        def advance(end: StepEnd) -> None:
            bar.length = end.steps * options["images"]
            bar.update(1)

        return pipeline(
            prompt,
            negative_prompt=options["negative_prompt"],
            image=options["image"],
            mask_image=options["mask"],
            strength=options["strength"],
            feather=options["feather"],
            height=options["height"],
            width=options["width"],
            num_inference_steps=options["steps"],
            timesteps=options["timesteps"],
            sigmas=levels,
            scheduler=options["scheduler"],
            scheduler_config={name: value for name, value in config.items() if value is not None},
            guidance_scale=scale[0] if scale is not None and len(scale) == 1 else scale,
            guidance_rescale=options["guidance_rescale"],
            guidance_interval=options["guidance_interval"],
            clip_skip=options["clip_skip"],
            original_size=options["original_size"],
            crops_coords_top_left=options["crops_coords_top_left"],
            target_size=options["target_size"],
            num_images_per_prompt=options["images"],
            seed=options["seed"],
            callback_on_step_end=advance,
        )


def _sigmas(options: dict[str, Any]) -> tuple[str | None, tuple[float, ...] | None]:
    """The spacing of the noise levels, or the levels themselves."""
    given = options["sigmas"]
    if options["karras"]:
        if given not in (None, "karras"):
            raise click.UsageError("--karras and --sigmas exclude each other")
        given = "karras"
    return (given, None) if given is None or isinstance(given, str) else (None, given)


def _parameters(pipeline: Pipeline, prompt: str, options: dict[str, Any], result: Output, number: int) -> Parameters:
    """What made one picture of a call: all that it takes to make it again."""
    from calotype.runtime.pictures.canvas import default_strength
    from calotype.runtime.pictures.parameters import Parameters, file_hash
    from calotype.runtime.schedulers import scheduler_name

    added = _additions(options)
    manifest, image, scales = pipeline.manifest, result.images[number], options["guidance_scale"]
    spacing, levels = _sigmas(options)
    acceleration = _acceleration(options)
    strength = default_strength(options["mask"]) if options["strength"] is None else options["strength"]
    scheduler = options["scheduler"] or manifest.defaults.scheduler or str(manifest.scheduler.get("_class_name"))
    further = {
        "Schedule type": spacing,
        "Sigmas": levels,
        "Timesteps": options["timesteps"],
        "Eta": options["eta"],
        "CFG rescale": options["guidance_rescale"] or None,
        "CFG interval": options["guidance_interval"] or acceleration.guidance_interval,
        "Cache interval": acceleration.cache_interval if acceleration.caches else None,
        "Precision": "int8" if result.int8 else None,
        "Clip skip": options["clip_skip"] + 1 if options["clip_skip"] else None,
        "Original size": options["original_size"],
        "Crop": options["crops_coords_top_left"],
        "Target size": options["target_size"],
        "Image": options["image"] and options["image"].name,
        "Image hash": options["image"] and file_hash(options["image"]),
        "Denoising strength": options["image"] and strength,
        "Mask": options["mask"] and options["mask"].name,
        "Mask hash": options["mask"] and file_hash(options["mask"]),
        "Feather": options["feather"] or None,
        "Lora": [f"{lora.path.name}:{lora.scale!r} {file_hash(lora.path)}" for lora in added["loras"]] or None,
        "TI": [f"{own.path.name}:{own.token} {file_hash(own.path)}" for own in added["embeddings"]] or None,
        "VAE": options["vae"] and Path(options["vae"]).name,
        "VAE tiles": options["vae_tiling"] or None,
    }
    return Parameters(
        prompt=prompt,
        negative_prompt=options["negative_prompt"],
        steps=result.steps,
        sampler=scheduler_name(scheduler),
        guidance_scale=manifest.defaults.guidance_scale if scales is None else scales[number % len(scales)],
        seed=result.seeds[number],
        width=image.width,
        height=image.height,
        model=manifest.name,
        model_hash=manifest.files[manifest.networks["unet"].weights[0]].sha256[:10],
        further={name: value for name, value in further.items() if value is not None},
    )
