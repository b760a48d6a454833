"""Pictures with T2I-Adapters against diffusers' pipelines, alone, several, and beside ControlNets."""

from __future__ import annotations

import dataclasses
import functools
import types
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calotype.runtime.bundle.folder import Bundle
from calotype.runtime.control import Control
from calotype.runtime.controlnets import CHECKS
from calotype.runtime.errors import BundleError, InputError
from calotype.runtime.pictures.embedded import read_parameters
from calotype.runtime.pictures.parameters import parse_parameters
from calotype.runtime.pipeline import Pipeline
from calotype.runtime.request import Request
from tests.runtime.command_line import calotype
from tests.runtime.conftest import Model
from tests.runtime.references import draws, injected, psnr
from tests.runtime.test_controlnet import SIZE, STEPS, drawn, picture
from tests.runtime.test_controlnet import reference as controlnet_reference


@pytest.fixture(scope="module")
def pipeline(tiny_bundle: Path, adapters: tuple[Model, ...], controlnets: tuple[Model, ...]) -> Any:
    folders = {"grey": adapters[0].bundle, "colour": adapters[1].bundle, "net": controlnets[0].bundle}
    with Pipeline.load(tiny_bundle, controls=folders) as opened:
        yield opened


def loaded(path: Path) -> Any:
    import diffusers
    import torch

    return diffusers.T2IAdapter.from_pretrained(path, torch_dtype=torch.float16)


def reference(checkpoint: Path, paths: Sequence[Path], class_name: str) -> Any:
    """Diffusers' pipeline of the checkpoint with those adapters, fp16 weights computed in float32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers
        import torch

        nets = [loaded(path) for path in paths]
        given = nets[0] if len(nets) == 1 else diffusers.MultiAdapter(nets)
        made = getattr(diffusers, class_name).from_pretrained(checkpoint, adapter=given, torch_dtype=torch.float16)
        made = made.to(torch.float32)
        made.set_progress_bar_config(disable=True)
    return made


def test_text_to_image_equals_diffusers_to_50_db(
    pipeline: Pipeline, tiny_checkpoint: Path, adapters: tuple[Model, ...]
) -> None:
    for name, model, image in (("grey", adapters[0], picture(1).convert("L")), ("colour", adapters[1], picture(1))):
        other = reference(tiny_checkpoint, [model.checkpoint], "StableDiffusionAdapterPipeline")
        with injected(other, noise=draws(5, (4, 16, 24), 1)[0]):
            expected = other(
                "red apple",
                image,
                negative_prompt="le",
                output_type="np",
                adapter_conditioning_scale=0.8,
                **SIZE,
                **STEPS,
            ).images[0]
        control = Control(model=name, image=picture(1), scale=0.8)
        assert psnr(drawn(pipeline, controls=[control], **SIZE), expected) >= 50


def test_several_equal_diffusers_to_50_db(
    pipeline: Pipeline, tiny_checkpoint: Path, adapters: tuple[Model, ...]
) -> None:
    paths = [adapters[1].checkpoint, adapters[1].checkpoint]
    other = reference(tiny_checkpoint, paths, "StableDiffusionAdapterPipeline")
    with injected(other, noise=draws(5, (4, 16, 24), 1)[0]):
        expected = other(
            "red apple", [picture(1), picture(2)], negative_prompt="le", output_type="np",
            adapter_conditioning_scale=[0.3, 0.9], **SIZE, **STEPS,
        ).images[0]  # fmt: skip
    controls = [
        Control(model="colour", image=picture(1), scale=0.3),
        Control(model="colour", image=picture(2), scale=0.9),
    ]
    assert psnr(drawn(pipeline, controls=controls, **SIZE), expected) >= 50


@pytest.mark.parametrize("end", [1.0, 0.5])
def test_beside_a_controlnet_equals_diffusers_to_50_db(
    pipeline: Pipeline, tiny_checkpoint: Path, adapters: tuple[Model, ...], controlnets: tuple[Model, ...], end: float
) -> None:
    """Diffusers has no pipeline with both; its UNet has, whose features are put into that with a ControlNet."""
    import torch

    other = controlnet_reference(tiny_checkpoint, [controlnets[0].checkpoint], "StableDiffusionControlNetPipeline")
    adapter, evaluations = loaded(adapters[1].checkpoint).to(torch.float32), []
    pixels = torch.from_numpy(np.asarray(picture(2), np.float32).transpose(2, 0, 1)[None] / 255)
    with torch.no_grad():
        features = [torch.cat([0.7 * feature] * 2) for feature in adapter(pixels)]
    forward = other.unet.forward

    @functools.wraps(forward)
    def adapted(*args: Any, **kwargs: Any) -> Any:
        evaluations.append(None)
        own = [feature.clone() for feature in features] if len(evaluations) <= 6 * end else None
        return forward(*args, down_intrablock_additional_residuals=own, **kwargs)

    other.unet.forward = adapted
    with injected(other, noise=draws(5, (4, 16, 24), 1)[0]):
        expected = other("red apple", picture(1), negative_prompt="le", output_type="np", **SIZE, **STEPS).images[0]
    net, features_of = (
        Control(model="net", image=picture(1)),
        Control(model="colour", image=picture(2), scale=0.7, end=end),
    )
    got = drawn(pipeline, controls=[net, features_of], **SIZE)
    assert psnr(got, expected) >= 50
    for alone in (net, features_of):
        assert psnr(drawn(pipeline, controls=[alone], **SIZE), expected) < 45


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_sdxl_equals_diffusers_to_50_db(sdxl: Model, sdxl_adapter: Model, factor: float) -> None:
    other = reference(sdxl.checkpoint, [sdxl_adapter.checkpoint], "StableDiffusionXLAdapterPipeline")
    with injected(other, noise=draws(5, (4, 16, 24), 1)[0]):
        expected = other(
            "red apple", image=picture(1), negative_prompt="le", output_type="np", adapter_conditioning_factor=factor,
            **SIZE, **STEPS,
        ).images[0]  # fmt: skip
    with Pipeline.load(sdxl.bundle, controls={"xl": sdxl_adapter.bundle}) as opened:
        control = Control(model="xl", image=picture(1), end=factor)
        assert psnr(drawn(opened, controls=[control], **SIZE), expected) >= 50
        with pytest.raises(InputError, match="takes pictures whose sides are multiples of 4; 46x32 was asked for"):
            opened("a", controls=[control], width=46, height=32)


def test_a_picture_is_the_same_alone_and_in_any_batch(pipeline: Pipeline) -> None:
    colour, net = Control(model="colour", image=picture(1)), Control(model="net", image=picture(2))
    common: dict[str, Any] = {"height": 32, "width": 48, "num_inference_steps": 4}
    kinds: list[tuple[Control, ...]] = [
        (colour,), (Control(model="colour", image=picture(3), end=0.5),), (colour, net), (net,),
        (colour, Control(model="grey", image=picture(4), start=0.4)),
    ]  # fmt: skip
    requests = [Request(prompt="a", seed=seed, controls=controls, **common) for seed, controls in enumerate(kinds)]
    requests.append(Request(prompt="a", seed=9, guidance_scale=1.0, controls=(colour,), **common))
    alone = [next(iter(pipeline.draw([request])))[1].image.tobytes() for request in requests]
    assert len(set(alone)) == len(alone)
    together = dict(pipeline.draw([*requests, *reversed(requests)]))
    assert [together[number].image.tobytes() for number in range(2 * len(alone))] == [*alone, *reversed(alone)]


def test_it_runs_once_a_picture(pipeline: Pipeline) -> None:
    session = pipeline._controlnets.session(pipeline._controlnets.named["colour"].key)
    run, runs = session.run, []

    def watched(sizes: Any) -> None:
        runs.append(sizes)
        run(sizes)

    session.run = watched  # type: ignore[method-assign]
    try:
        for image in (picture(20), picture(20), picture(21)):
            control = Control(model="colour", image=image)
            pipeline(["a", "red apple"], controls=[control], num_inference_steps=3, **SIZE)
    finally:
        session.run = run  # type: ignore[method-assign]
    assert runs == [{"rows": 1, "height": 16, "width": 24}] * 2


def test_what_does_not_fit_gets_one_line(
    pipeline: Pipeline, tiny_bundle: Path, adapters: tuple[Model, ...], sdxl_adapter: Model
) -> None:
    control = Control(model="colour", image=picture(1), guess=True)
    with pytest.raises(InputError, match=r"guess mode is of ControlNets, and .* is a T2I-Adapter; leave it out"):
        pipeline("a", controls=[control], **SIZE)
    with pytest.raises(
        InputError, match=r"is a T2I-Adapter for models as sdxl, and .* is sd1 or of other widths; use one"
    ):
        Pipeline.load(tiny_bundle, controls={"xl": sdxl_adapter.bundle})
    with pytest.raises(BundleError, match="takes no T2I-Adapters; export the bundle again"):
        adapter = Bundle.open(adapters[1].bundle)
        CHECKS["t2i_adapter"](adapter, adapter.manifest.networks["t2i_adapter"], older(Bundle.open(tiny_bundle)))


def older(bundle: Bundle) -> Any:
    """A bundle whose UNet for control was exported before it took features."""
    networks = dict(bundle.manifest.networks)
    spec = networks["unet_control"]
    inputs = tuple(own for own in spec.inputs if not own.name.startswith("adapter_feature"))
    networks["unet_control"] = dataclasses.replace(spec, inputs=inputs)
    manifest = types.SimpleNamespace(networks=networks, family="sd1", vae=bundle.manifest.vae, name="old")
    return types.SimpleNamespace(path=bundle.path, manifest=manifest)


def test_from_the_command_line_and_again(tiny_bundle: Path, adapters: tuple[Model, ...], tmp_path: Path) -> None:
    picture(1).save(tmp_path / "photo.png")
    folders = [f"--folder={path}" for path in (tiny_bundle, adapters[0].bundle, tmp_path)]
    ran = calotype(
        "generate", "a", "--model", tiny_bundle, "--output", tmp_path / "a.png", "--steps", "3", "--seed", "1",
        "--width", "48", "--height", "32",
        "--control", f"lines={adapters[0].bundle}:canny-50-150,stretch@{tmp_path / 'photo.png'}:0.9:0:0.7",
    )  # fmt: skip
    assert (ran.returncode, ran.stderr) == (0, "")
    text = parse_parameters(read_parameters(tmp_path / "a.png")).further["ControlNets"]
    for part in ('"scale": 0.9', '"end": 0.7', '"preprocess": "canny-50-150"', '"resize": "stretch"'):
        assert part in text
    again = calotype("generate", "--again", tmp_path / "a.png", "--output", tmp_path / "b.png", *folders)
    assert (again.returncode, again.stderr) == (0, "")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
