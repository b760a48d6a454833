"""``calotype generate``."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from calotype.runtime.cli.precision import Precision
from calotype.runtime.cli.progress import Progress

if TYPE_CHECKING:
    from calotype.runtime.call import Call
    from calotype.runtime.control import Control
    from calotype.runtime.denoising.acceleration import Acceleration
    from calotype.runtime.image_prompt import ImagePrompt
    from calotype.runtime.pipeline import Pipeline
    from calotype.runtime.request import Request

# Options that a request has under the same name.
SAME_NAME = (
    "strength",
    "feather",
    "height",
    "width",
    "timesteps",
    "scheduler",
    "guidance_rescale",
    "guidance_interval",
    "clip_skip",
    "original_size",
    "crops_coords_top_left",
    "target_size",
)
# Options that say nothing of the picture itself, or name what its settings cannot hold.
BESIDE_AGAIN = (
    "output",
    "overwrite",
    "as_json",
    "again",
    "folders",
    "image",
    "mask",
    "backend",
    "low_memory",
    "trace",
    "threads",
)


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
        known |= {name.removeprefix("--"): parameter for name in names if parameter.name not in ("config", "again")}
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
@click.argument("prompt", required=False)
@click.option(
    "-m", "--model", default="talbot", show_default=True, help="A bundled model's name, or a bundle's folder."
)
@click.option(
    "-o",
    "--output",
    type=FILE,
    default=Path("calotype.png"),
    show_default=True,
    help="A picture file; several are cat-0.png, cat-1.png …",
)
@click.option("-n", "--negative-prompt", help="What to steer away from.")
@click.option("--image", type=FILE, help="A picture to start from.")
@click.option("--strength", type=float, help="0 to 1, how much of it is given up.  [default: 0.8, with a mask 1]")
@click.option("--mask", type=FILE, help="A picture of its size, white where to draw; the rest comes back exactly.")
@click.option("--feather", type=int, help="Pixels inside the mask over which the two fade.  [default: 0]")
@click.option(
    "--reference",
    "references",
    type=FILE,
    multiple=True,
    help="A picture that a model which edits goes by, as FLUX.2 klein; can be given several times.",
)
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
    "--cfg-scale",
    type=Numbers(),
    help="How strictly to follow the prompt, for all or for each image; off at 1.  [default: the model's]",
)
@click.option("--guidance-rescale", type=float, help="0 to 1, against overexposure.  [default: 0]")
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
    type=Precision(["float16", "float32", "int8"]),
    help="What the UNet is computed in; int8 takes an engine that was built so, and draws nearly the same picture.  "
    "[default: what the backend is fast in, and with --fast int8 where it was built]",
)
@click.option("--clip-skip", type=int, help="Last layers of the text encoder to leave out.  [default: 0]")
@click.option("--original-size", type=int, nargs=2, metavar="HEIGHT WIDTH", help="SDXL's, before scaling.")
@click.option("--crops-coords-top-left", type=int, nargs=2, metavar="TOP LEFT", help="SDXL's crop.")
@click.option("--target-size", type=int, nargs=2, metavar="HEIGHT WIDTH", help="SDXL's, after scaling.")
@click.option("--seed", type=int, help="0 to 2**64-1; the same seed gives the same picture.  [default: random]")
@click.option("-W", "--width", type=int, help="Pixels.  [default: the picture's or the model's]")
@click.option("-H", "--height", type=int, help="Pixels.  [default: the picture's or the model's]")
@click.option("--images", type=int, help="How many, with consecutive seeds.  [default: 1]")
@click.option(
    "--lora",
    "loras",
    multiple=True,
    metavar="LORA[:SCALE]",
    help="A LoRA to merge into the weights, 0.8 of it, say: a file, a folder by PEFT, or a name in --lora-folder; can "
    "be given several times.",
)
@click.option("--lora-folder", type=FILE, help="A folder whose LoRAs can be named, files without their suffix.")
@click.option(
    "--prompt-loras", is_flag=True, help="Have <lora:NAME:SCALE> in PROMPT name one of --lora-folder, not be words."
)
@click.option(
    "--embedding",
    "embeddings",
    multiple=True,
    metavar="FILE[:WORD]",
    help="A textual inversion whose word the prompt may use; can be given several times.",
)
@click.option(
    "--control",
    "controls",
    multiple=True,
    metavar="NAME=BUNDLE:PICTURE[:SCALE[:START:END]]",
    help="The bundle of a ControlNet or T2I-Adapter and its picture, which canny@, threshold@, grayscale@ or inpaint@ "
    "before it prepares; without one, that of --image. How much of it, and in which share of the steps; can be given "
    "several times.",
)
@click.option("--guess-mode", is_flag=True, help="Let ControlNets lead, where the prompt says little or nothing.")
@click.option(
    "--image-prompt",
    "image_prompts",
    multiple=True,
    metavar="NAME=BUNDLE:PICTURE[,PICTURE…][:SCALE]",
    help="An IP-Adapter's bundle and the pictures that it reads beside PROMPT, and how much of it; can be given "
    "several times.",
)
@click.option("--safety-checker", is_flag=True, help="Have the model's own look; what it takes exception to is black.")
@click.option("--vae", help="A bundle whose autoencoder to use instead, such as a tiny one.")
@click.option("--vae-tiling", is_flag=True, help="Read and draw large pictures in tiles, in less memory.")
@click.option("--backend", default="auto", show_default=True, help="auto, tensorrt, tensorrt-rtx, cuda or cpu.")
@click.option("--low-memory", is_flag=True, help="Keep one network in memory at a time; slower.")
@click.option("--threads", type=int, help="How many a CPU computes with.  [default: as many as may be used]")
@click.option("--trace", is_flag=True, help="Say on stderr where the time went, with a backend of cpu by operator.")
@click.option("--overwrite", is_flag=True, help="Replace a picture of that name.")
@click.option("--json", "as_json", is_flag=True, help="Print paths, seeds and timings as JSON.")
@click.option(
    "--again",
    type=FILE,
    metavar="PICTURE",
    help="Draw a picture of Calotype's once more, by the settings it carries; in place of PROMPT.",
)
@click.option(
    "--folder",
    "folders",
    type=FILE,
    multiple=True,
    help="With --again: where its model and its LoRAs are looked for, by their hashes; can be given several times.",
)
@click.option(
    "--config",
    type=FILE,
    is_eager=True,
    expose_value=False,
    callback=use_settings,
    help="A TOML file that may say any of this; the command line wins.",
)
def command(
    prompt: str | None, model: str, output: Path, overwrite: bool, as_json: bool, again: Path | None, **options: Any
) -> None:
    """Draw PROMPT. Pictures that exist are kept: another gets a number in its name."""
    from calotype.runtime.pictures.writing import check_target
    from calotype.runtime.pipeline import Pipeline
    from calotype.runtime.sessions.traced import Trace

    if again is None and prompt is None:
        raise click.UsageError("Missing argument 'PROMPT'")
    if again is not None and prompt is not None:
        raise click.UsageError("--again takes the prompt from the picture; leave PROMPT out")
    check_target(output)  # before the work, not after it
    if again is None:
        where: str | Path = model
        requests, additions = _requests(prompt, options), _additions(options)
    else:
        requests, where, additions = _recalled(again, options)
    trace = Trace() if options["trace"] else None
    begin = time.perf_counter()
    with Pipeline.load(
        where,
        options["backend"],
        low_memory=options["low_memory"],
        safety_checker=options["safety_checker"],
        trace=trace,
        threads=options["threads"],
        **additions,
    ) as pipeline:
        files, call = _draw(pipeline, requests, output, overwrite)
        seconds = time.perf_counter() - begin
    timings = call.timings
    if trace is not None:
        click.echo(trace.text(timings, seconds), err=True)
    if as_json:
        more = {} if trace is None else {"trace": trace.to_json()}
        value = {"images": files, "backend": pipeline.backend, "timings": timings.to_json(), **more}
        click.echo(json.dumps(value))
    else:
        for file in files:
            click.echo(file["path"])


def _recalled(picture: Path, options: dict[str, Any]) -> tuple[list[Request], Path, dict[str, Any]]:
    """What made ``picture``: the request, the model's folder, and what was added to the model."""
    from calotype.runtime.pictures.autoencoder import Tiles
    from calotype.runtime.pictures.embedded import read_parameters
    from calotype.runtime.recall import recall

    context = click.get_current_context()
    others = [
        f"--{name.replace('_', '-')}"
        for name in context.params
        if name not in BESIDE_AGAIN and context.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE
    ]
    if others:
        raise click.UsageError(f"--again takes all settings from the picture; leave out {', '.join(others)}")
    found = recall(read_parameters(picture), options["folders"], image=options["image"], mask_image=options["mask"])
    additions = {
        "loras": found.request.loras or (),
        "embeddings": found.embeddings,
        "vae": found.vae,
        "vae_tiles": Tiles() if found.tiled else None,
        "fast": found.request.fast,
    }
    return [found.request], found.model, additions


def _requests(prompt: str | None, options: dict[str, Any]) -> list[Request]:
    """The pictures that the command line asks for."""
    from calotype.runtime.request import expand

    scale, (spacing, levels) = options["guidance_scale"], _sigmas(options)
    controls = [dataclasses.replace(control, guess=options["guess_mode"]) for _, _, control in _controls(options)]
    config = {"sigma_spacing": spacing, "eta": options["eta"]}
    return expand(
        prompt,
        options["negative_prompt"],
        images=options["images"],
        guidance_scale=scale[0] if scale is not None and len(scale) == 1 else scale,
        seed=options["seed"],
        image=options["image"],
        mask_image=options["mask"],
        num_inference_steps=options["steps"],
        sigmas=levels,
        scheduler_config={name: value for name, value in config.items() if value is not None},
        controls=controls,
        image_prompts=[prompt for _, _, prompt in _image_prompts(options)],
        references=options["references"],
        **{name: options[name] for name in SAME_NAME},
    )


def _draw(pipeline: Pipeline, requests: list[Request], output: Path, overwrite: bool) -> tuple[list[Any], Call]:
    """Draw, and save each picture as soon as it is finished; returns where, in the order of the requests."""
    files: dict[int, Any] = {}
    with Progress(len(requests)) as progress:
        call = pipeline.draw(requests, callback=progress.advance)
        for number, picture in call:
            path = picture.save(output, number=number if len(requests) > 1 else None, overwrite=overwrite)
            files[number] = {"path": str(path), "seed": picture.seed}
            if picture.flagged is not None:
                files[number]["flagged"] = picture.flagged
            if picture.flagged:
                click.echo(f"{path} is black: the safety checker takes exception to the picture", err=True)
    return [files[number] for number in sorted(files)], call


def _additions(options: dict[str, Any]) -> dict[str, Any]:
    """What is added to the model when it is loaded."""
    from calotype.runtime.adapters.named import parse
    from calotype.runtime.pictures.autoencoder import Tiles
    from calotype.runtime.text.textual_inversion import Embedding

    return {
        "loras": [parse(text) for text in options["loras"]],
        "lora_folder": options["lora_folder"],
        "prompt_loras": options["prompt_loras"],
        "embeddings": [Embedding.parse(text) for text in options["embeddings"]],
        "vae": options["vae"],
        "vae_tiles": Tiles() if options["vae_tiling"] else None,
        "controls": {name: folder for name, folder, _ in _controls(options)},
        "image_prompts": {name: folder for name, folder, _ in _image_prompts(options)},
        "fast": _acceleration(options),
    }


def _controls(options: dict[str, Any]) -> list[tuple[str, Path, Control]]:
    """Each ControlNet's name, its bundle's folder, and what the pictures take of it."""
    from calotype.runtime.control import Control
    from calotype.runtime.errors import InputError

    found = [Control.parse(text) for text in options["controls"]]
    _check_names("controls", [(name, folder) for name, folder, _ in found])
    if options["guess_mode"] and not found:
        raise InputError("--guess-mode is about ControlNets, and there is none; give --control too")
    return found


def _image_prompts(options: dict[str, Any]) -> list[tuple[str, Path, ImagePrompt]]:
    """Each IP-Adapter's name, its bundle's folder, and what the pictures take of it."""
    from calotype.runtime.image_prompt import ImagePrompt

    found = [ImagePrompt.parse(text) for text in options["image_prompts"]]
    _check_names("image prompts", [(name, folder) for name, folder, _ in found])
    return found


def _check_names(what: str, pairs: list[tuple[str, Path]]) -> None:
    from calotype.runtime.errors import InputError

    folders: dict[str, Path] = {}
    for name, folder in pairs:
        if folders.setdefault(name, folder) != folder:
            raise InputError(f"two {what} are named {name}, and have different bundles; give each its own name")


def _acceleration(options: dict[str, Any]) -> Acceleration:
    from calotype.runtime.denoising.acceleration import EXACT, FAST

    preset = FAST if options["fast"] else EXACT
    given = {name: options[name] for name in ("cache_interval", "precision") if options[name] is not None}
    return dataclasses.replace(preset, **given)


def _sigmas(options: dict[str, Any]) -> tuple[str | None, tuple[float, ...] | None]:
    """The spacing of the noise levels, or the levels themselves."""
    given = options["sigmas"]
    if options["karras"]:
        if given not in (None, "karras"):
            raise click.UsageError("--karras and --sigmas exclude each other")
        given = "karras"
    return (given, None) if given is None or isinstance(given, str) else (None, given)
