"""FLUX.2 klein's checkpoints: each graph against diffusers' and transformers' own classes, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file

from calotype.export.bundle import export_checkpoint
from calotype.export.sources import load_checkpoint
from calotype.runtime.bundle.manifest import Manifest
from calotype.runtime.bundle.parity import MIN_COSINE
from calotype.runtime.errors import CheckpointError, InputError, UnsupportedArchitectureError
from tests.klein import LATENT_CHANNELS, READ, WIDTH

RELATIVE = 1e-4


@pytest.fixture(scope="module")
def reference(klein_checkpoint: Path) -> Any:
    """Diffusers' pipeline on the same weights, in float32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers

        pipeline = diffusers.Flux2KleinPipeline.from_pretrained(klein_checkpoint, torch_dtype=torch.float16)
        return pipeline.to(torch.float32)


def graph(bundle: Path, network: str, **inputs: Any) -> list[np.ndarray]:
    """What a float32 graph gives."""
    session = onnxruntime.InferenceSession(bundle / f"{network}.fp32.onnx", providers=["CPUExecutionProvider"])
    return list(session.run(None, {name: np.asarray(value) for name, value in inputs.items()}))


def relative(got: np.ndarray, wanted: torch.Tensor) -> float:
    expected = wanted.detach().numpy()
    assert got.shape == expected.shape
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def latents(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize(("rows", "height", "width", "text"), [(1, 8, 8, 512), (3, 5, 12, 9), (2, 1, 3, 20)])
@pytest.mark.parametrize("references", [(), ((4, 6),), ((2, 3), (5, 1))])
@torch.no_grad()
def test_the_transformer_equals_diffusers(
    klein_bundle: Path,
    reference: Any,
    rows: int,
    height: int,
    width: int,
    text: int,
    references: tuple[tuple[int, int], ...],
) -> None:
    channels = 4 * LATENT_CHANNELS
    sample, prompt = latents(rows, channels, height, width), latents(rows, text, 3 * WIDTH)
    timestep = torch.linspace(3, 997, rows)
    pictures = [latents(1, channels, *size) for size in references]
    given: dict[str, Any] = {"sample": sample, "timestep": timestep, "encoder_hidden_states": prompt}
    tokens, places = reference._pack_latents(sample), reference._prepare_latent_ids(sample)
    if pictures:
        packed = torch.cat([reference._pack_latents(own) for own in pictures], dim=1).expand(rows, -1, -1)
        own = reference._prepare_image_ids(pictures).expand(rows, -1, -1)
        tokens, places = torch.cat([tokens, packed], dim=1), torch.cat([places, own], dim=1)
        given |= {"reference_latents": packed, "reference_positions": own.float()}
    wanted = reference.transformer(
        hidden_states=tokens,
        timestep=timestep / 1000,
        encoder_hidden_states=prompt,
        txt_ids=reference._prepare_text_ids(prompt),
        img_ids=places,
        return_dict=False,
    )[0][:, : height * width]
    (got,) = graph(klein_bundle, "transformer_edit" if pictures else "transformer", **given)
    assert relative(got, wanted.transpose(1, 2).unflatten(2, (height, width))) <= RELATIVE


@pytest.mark.parametrize("count", [1, 40, 512])
@torch.no_grad()
def test_the_text_encoder_equals_transformers(klein_bundle: Path, reference: Any, count: int) -> None:
    ids = torch.randint(0, 300, (2, 512), generator=torch.Generator().manual_seed(count))
    mask = (torch.arange(512) < count).long().expand(2, -1)
    states = reference.text_encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    (got,) = graph(klein_bundle, "text_encoder", input_ids=ids, attention_mask=mask)
    assert relative(got, torch.cat([states[number] for number in READ], dim=-1)) <= RELATIVE


def test_layers_behind_the_last_that_is_read_are_left_out(klein_bundle: Path) -> None:
    names = load_file(klein_bundle / "text_encoder.safetensors").keys()
    assert {name.split(".")[1] for name in names if name.startswith("layers.")} == {"0", "1", "2"}
    assert not any(name.startswith(("norm", "lm_head")) for name in names)


@torch.no_grad()
def test_the_autoencoder_equals_diffusers(klein_bundle: Path, reference: Any) -> None:
    packed = latents(1, 4 * LATENT_CHANNELS, 5, 8)
    vae = reference.vae
    mean, deviation = vae.bn.running_mean[:, None, None], torch.sqrt(vae.bn.running_var + 1e-4)[:, None, None]
    wanted = vae.decode(reference._unpatchify_latents(packed * deviation + mean)).sample
    (got,) = graph(klein_bundle, "vae_decoder", latents=packed)
    assert relative(got, wanted) <= RELATIVE
    image = torch.rand(1, 3, 24, 32, generator=torch.Generator().manual_seed(2)) * 2 - 1
    read, spread = graph(klein_bundle, "vae_encoder", image=image)
    assert relative(read, reference._encode_vae_image(image, None)) <= RELATIVE
    assert (spread == -30).all()


def test_the_manifest_says_how_it_is_drawn(klein_bundle: Path) -> None:
    manifest = Manifest.read(klein_bundle)
    assert (manifest.family, manifest.distilled) == ("flux2-klein", True)
    assert (manifest.defaults.num_inference_steps, manifest.defaults.guidance_scale) == (4, 1.0)
    assert (manifest.vae.latent_channels, manifest.vae.downscale) == (16, 4)
    assert manifest.scheduler["_class_name"] == "FlowMatchEulerDiscreteScheduler"
    assert all(figures["float32"]["max_relative"] <= RELATIVE for figures in manifest.parity.values())


@pytest.mark.slow
def test_float16_graphs_pass_their_checks(klein_checkpoint: Path, tmp_path: Path) -> None:
    parity = export_checkpoint(klein_checkpoint, tmp_path / "half").parity
    assert all(figures["float16"]["min_cosine"] >= MIN_COSINE for figures in parity.values())


@pytest.fixture
def changed(klein_checkpoint: Path, tmp_path: Path) -> Path:
    """The checkpoint, to be changed."""
    shutil.copytree(klein_checkpoint, tmp_path / "klein")
    return tmp_path / "klein"


def rewrite(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_a_base_model_is_drawn_with_guidance(changed: Path) -> None:
    rewrite(changed / "model_index.json", is_distilled=False)
    checkpoint = load_checkpoint(changed)
    assert not checkpoint.distilled
    assert checkpoint.defaults == {"num_inference_steps": 50, "guidance_scale": 4.0}


@pytest.mark.parametrize(
    ("file", "fields", "message"),
    [
        (
            "transformer",
            {"guidance_embeds": True},
            "says guidance_embeds=True, which is not supported; supported: False",
        ),
        ("transformer", {"axes_dims_rope": [8, 8]}, "axes_dims_rope=\\(8, 8\\) of the transformer is not supported"),
        ("transformer", {"_class_name": "FluxTransformer2DModel"}, "holds a FluxTransformer2DModel, which is not sup"),
        ("transformer", {"in_channels": 64}, "the transformer's weights do not match its configuration"),
        (
            "text_encoder",
            {"attention_bias": True},
            "says attention_bias=True, which is not supported; supported: False",
        ),
        ("text_encoder", {"rope_parameters": {"rope_type": "yarn", "factor": 2}}, "rope_type='yarn' of the text enco"),
        ("vae", {"patch_size": [1, 1]}, r"says patch_size=.*, which is not supported; supported: \(2, 2\)"),
    ],
)
def test_another_architecture_is_named(changed: Path, file: str, fields: dict[str, Any], message: str) -> None:
    rewrite(changed / file / "config.json", **fields)
    with pytest.raises((CheckpointError, UnsupportedArchitectureError), match=message):
        load_checkpoint(changed)


def test_another_scheduler_is_named(changed: Path) -> None:
    rewrite(changed / "scheduler" / "scheduler_config.json", _class_name="DDIMScheduler")
    with pytest.raises(UnsupportedArchitectureError, match="names the scheduler DDIMScheduler, which is not supported"):
        load_checkpoint(changed)


@pytest.mark.parametrize("stray", ["model.layers.1.self_attn.q_proj.bias", "visual.proj.weight"])
def test_a_stray_tensor_is_named(changed: Path, stray: str) -> None:
    path = changed / "text_encoder" / "model.safetensors"
    save_file({**load_file(path), stray: torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match=f"1 unexpected: {stray.removeprefix('model.')}"):
        load_checkpoint(changed)


@pytest.mark.parametrize(
    "pipeline",
    ["FluxPipeline", "Flux2Pipeline", "StableDiffusion3Pipeline", "QwenImagePipeline", "Flux2KleinKVPipeline"],
)
def test_another_family_is_named(changed: Path, pipeline: str) -> None:
    rewrite(changed / "model_index.json", _class_name=pipeline)
    with pytest.raises(
        UnsupportedArchitectureError, match=f"holds a {pipeline}, which is not supported; supported: .*"
    ):
        load_checkpoint(changed)


def original(folder: Path) -> dict[str, torch.Tensor]:
    """The transformer's tensors under the names of the original code, by the inverse of diffusers' own reader."""
    state: dict[str, torch.Tensor] = {}
    for shard in sorted((folder / "transformer").glob("*.safetensors")):
        state |= load_file(shard)
    found: dict[str, torch.Tensor] = {}
    for stream, (query, key, value) in {
        "img": ("to_q", "to_k", "to_v"),
        "txt": ("add_q_proj", "add_k_proj", "add_v_proj"),
    }.items():
        parts = [state.pop(f"transformer_blocks.0.attn.{name}.weight") for name in (query, key, value)]
        found[f"double_blocks.0.{stream}_attn.qkv.weight"] = torch.cat(parts)
    found["final_layer.adaLN_modulation.1.weight"] = torch.cat(state.pop("norm_out.linear.weight").chunk(2)[::-1])
    for name, tensor in state.items():
        for ours, theirs in ORIGINAL.items():
            name = re.sub(f"^{ours}", theirs, name)
        found[name] = tensor
    return found


ORIGINAL = {
    r"single_transformer_blocks\.(\d+)\.attn\.norm_q\.weight": r"single_blocks.\1.norm.query_norm.scale",
    r"single_transformer_blocks\.(\d+)\.attn\.norm_k\.weight": r"single_blocks.\1.norm.key_norm.scale",
    r"single_transformer_blocks\.(\d+)\.attn\.to_qkv_mlp_proj": r"single_blocks.\1.linear1",
    r"single_transformer_blocks\.(\d+)\.attn\.to_out": r"single_blocks.\1.linear2",
    r"transformer_blocks\.0\.attn\.norm_q\.weight": "double_blocks.0.img_attn.norm.query_norm.scale",
    r"transformer_blocks\.0\.attn\.norm_k\.weight": "double_blocks.0.img_attn.norm.key_norm.scale",
    r"transformer_blocks\.0\.attn\.norm_added_q\.weight": "double_blocks.0.txt_attn.norm.query_norm.scale",
    r"transformer_blocks\.0\.attn\.norm_added_k\.weight": "double_blocks.0.txt_attn.norm.key_norm.scale",
    r"transformer_blocks\.0\.attn\.to_out\.0": "double_blocks.0.img_attn.proj",
    r"transformer_blocks\.0\.attn\.to_add_out": "double_blocks.0.txt_attn.proj",
    r"transformer_blocks\.0\.ff\.linear_in": "double_blocks.0.img_mlp.0",
    r"transformer_blocks\.0\.ff\.linear_out": "double_blocks.0.img_mlp.2",
    r"transformer_blocks\.0\.ff_context\.linear_in": "double_blocks.0.txt_mlp.0",
    r"transformer_blocks\.0\.ff_context\.linear_out": "double_blocks.0.txt_mlp.2",
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    r"time_guidance_embed\.timestep_embedder\.linear_1": "time_in.in_layer",
    r"time_guidance_embed\.timestep_embedder\.linear_2": "time_in.out_layer",
    r"(double|single)_stream_modulation(_img|_txt|)\.linear": r"\1_stream_modulation\2.lin",
    "proj_out": "final_layer.linear",
}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_transformer_in_one_file_takes_the_place_of_the_folders(
    klein_checkpoint: Path, tmp_path: Path, prefix: str
) -> None:
    from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers

    tensors = {name: tensor + 0.25 for name, tensor in original(klein_checkpoint).items()}
    path = tmp_path / "tuned.safetensors"
    save_file({f"{prefix}{name}": tensor.contiguous() for name, tensor in tensors.items()}, path)
    checkpoint = load_checkpoint(klein_checkpoint, transformer=path)
    wanted = convert_flux2_transformer_checkpoint_to_diffusers(tensors)
    found = checkpoint.components["transformer"].state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert checkpoint.source["transformer"] == "tuned.safetensors"


def test_a_transformer_in_scaled_float8_is_multiplied_out(klein_checkpoint: Path, tmp_path: Path) -> None:
    name, tensors = "single_blocks.0.linear2", original(klein_checkpoint)
    exact = tensors[f"{name}.weight"].float()
    scale = exact.abs().max() / 448
    stored = (exact / scale).to(torch.float8_e4m3fn)
    tensors |= {f"{name}.weight": stored, f"{name}.scale_weight": scale[None]}
    save_file({own: tensor.contiguous() for own, tensor in tensors.items()}, tmp_path / "fp8.safetensors")
    checkpoint = load_checkpoint(klein_checkpoint, transformer=tmp_path / "fp8.safetensors")
    got = checkpoint.components["transformer"].state_dict()["single_transformer_blocks.0.attn.to_out.weight"]
    assert torch.equal(got, (stored.float() * scale).half())


def test_a_stray_of_such_a_file_is_named(klein_checkpoint: Path, tmp_path: Path) -> None:
    tensors = {**original(klein_checkpoint), "guidance_in.in_layer.weight": torch.zeros(2, 2)}
    save_file({own: tensor.contiguous() for own, tensor in tensors.items()}, tmp_path / "dev.safetensors")
    with pytest.raises(CheckpointError, match=r"1 unexpected: guidance_in\.in_layer\.weight"):
        load_checkpoint(klein_checkpoint, transformer=tmp_path / "dev.safetensors")


def test_a_model_without_a_transformer_takes_none(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no transformer that another could take the place of; leave it out"):
        load_checkpoint(tiny_checkpoint, transformer=tmp_path / "any.safetensors")
