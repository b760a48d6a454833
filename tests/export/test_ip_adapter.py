"""IP-Adapters and their image encoders against diffusers' and transformers' own; and their bundles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.embeddings import ImageProjection

from calotype.export.bundle import export_checkpoint
from calotype.export.graphs import unet_additions
from calotype.export.models.clip_vision import ImageEncoder
from calotype.export.models.ip_adapter import IPAdapter
from calotype.export.models.unet import UNet, UNetConfig, cross_attentions
from calotype.export.sources import load_checkpoint
from calotype.export.verification import verify_against
from calotype.export.weights import to_float32
from calotype.runtime.bundle.folder import Bundle
from calotype.runtime.errors import CalotypeError, CheckpointError, InputError, UnsupportedArchitectureError
from tests.export.conftest import LAYERS, UNETS
from tests.ip_adapters import (
    ENCODER,
    KINDS,
    image_encoder,
    ip_adapter,
    layers_of,
    nested,
    write_image_encoder,
    write_ip_adapter,
)


def unet(family: str) -> Any:
    torch.manual_seed(2)
    return UNet2DConditionModel(**UNETS[family], layers_per_block=LAYERS).eval()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_image_encoder(tmp_path_factory.mktemp("beside") / "image_encoder", 1)


def loaded(path: Path, **more: Any) -> tuple[ImageEncoder, IPAdapter]:
    components = load_checkpoint(path, **more).components
    encoder, adapter = components["image_encoder"], components["ip_adapter"]
    assert isinstance(encoder, ImageEncoder) and isinstance(adapter, IPAdapter)
    to_float32(encoder)
    to_float32(adapter)
    return encoder, adapter


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_what_diffusers_and_transformers_do(encoder: Path, kind: str, suffix: str) -> None:
    model = unet("sd1")
    state = ip_adapter(1, kind, layers_of(model), model.config.cross_attention_dim)
    path = write_ip_adapter(encoder.parent / f"ip-adapter-{kind}{suffix}", state)
    own_encoder, own = loaded(path)
    pixels = torch.randn(2, 3, 32, 32)
    reference = image_encoder(1).half().float()
    model._load_ip_adapter_weights([nested({name: tensor.float() for name, tensor in state.items()})])
    projection = model.encoder_hid_proj.image_projection_layers[0]
    with torch.no_grad():
        made = reference(pixels, output_hidden_states=True)
        expected = made.image_embeds if isinstance(projection, ImageProjection) else made.hidden_states[-2]
        got = own_encoder(pixels)
        assert float((got - expected).abs().max() / expected.abs().max()) < 1e-5
        assert float((got[0] - got[1]).abs().max()) > 0.1
        tokens = projection(expected)
        assert torch.allclose(own.image_proj(expected), tokens, atol=1e-5)
        keys = iter(own.keys_and_values(tokens))
        processors = [one for name, one in model.attn_processors.items() if name.endswith("attn2.processor")]
        for processor in processors:
            for linear in (processor.to_k_ip[0], processor.to_v_ip[0]):
                assert torch.allclose(next(keys), linear(tokens), atol=1e-4)
    assert next(keys, None) is None


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_unet_reads_image_prompts_as_diffusers_does(family: str) -> None:
    reference = unet(family)
    config, widths = UNetConfig.from_json(dict(reference.config)), layers_of(reference)
    own = UNet(config)
    own.load_state_dict(reference.state_dict())
    context = config.cross_attention_dim
    states = [nested(ip_adapter(seed, kind, widths, context)) for seed, kind in ((1, "plain"), (2, "plus"))]
    reference._load_ip_adapter_weights([{part: {name: tensor.float() for name, tensor in rest.items()}
                                         for part, rest in state.items()} for state in states])  # fmt: skip
    scales = [0.7, 0.4]
    for processor in reference.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale = scales
    embeddings = [torch.randn(2, 2, ENCODER["projection_dim"]), torch.randn(2, 1, 17, ENCODER["hidden_size"])]
    given = {"sample": torch.randn(2, 4, 11, 8), "timestep": torch.tensor([3.0, 900.0])}
    given["encoder_hidden_states"] = torch.randn(2, 5, context)
    added: dict[str, Any] = {"image_embeds": embeddings}
    if family == "sdxl":
        size, dim = config.addition_time_embed_dim, config.projection_class_embeddings_input_dim
        assert size is not None and dim is not None
        sizes = {"text_embeds": torch.randn(2, dim - 6 * size), "time_ids": torch.rand(2, 6) * 512}
        given |= sizes
        added |= sizes
    first = [given[name] for name in ("sample", "timestep", "encoder_hidden_states")]
    with torch.no_grad():
        expected = reference(*first, added_cond_kwargs=added, return_dict=False)[0]
        tokens = [one.flatten(1, 2) for one in reference.encoder_hid_proj(embeddings)]
        prompts = image_inputs(reference, config, tokens, scales)
        zeros = {addition.spec.name: torch.zeros(()) for addition in unet_additions(config)}
        got = own.prompted(**given, **prompts, **zeros)
        plain = own(**given)
    assert float((got - expected).abs().max() / expected.abs().max()) < 1e-5
    assert float((got - plain).abs().max() / expected.abs().max()) > 0.01


def image_inputs(reference: Any, config: UNetConfig, tokens: list[Any], scales: list[float]) -> dict[str, Any]:
    """What the UNet's graph takes, by diffusers' layers: down, up and the middle, and the tokens filled up."""
    processors = [one for name, one in reference.attn_processors.items() if name.endswith("attn2.processor")]
    blocks = cross_attentions(config)
    order = [block for block in blocks if block[0] != "mid"] + [block for block in blocks if block[0] == "mid"]
    most, found, waiting = max(one.shape[1] for one in tokens), dict[str, Any](), iter(processors)
    for name, count, _ in order:
        own = [next(waiting) for _ in range(count)]
        for what, scaled in (("keys", False), ("values", True)):
            layers = []
            for processor in own:
                linears = processor.to_v_ip if scaled else processor.to_k_ip
                made = [
                    torch.nn.functional.pad(linear(one) * (scale if scaled else 1), (0, 0, 0, most - one.shape[1]))
                    for linear, one, scale in zip(linears, tokens, scales, strict=True)
                ]
                layers.append(torch.stack(made, 1))
            found[f"{name}_image_{what}"] = torch.stack(layers, 1)
    bias = torch.zeros(2, len(tokens), most)
    for number, one in enumerate(tokens):
        bias[:, number, one.shape[1] :] = -1000
    return {**found, "image_bias": bias}


def test_a_bundle_of_the_kind_ip_adapter(encoder: Path, tmp_path: Path) -> None:
    model = unet("sd1")
    state = ip_adapter(1, "plus", layers_of(model), model.config.cross_attention_dim)
    path = write_ip_adapter(encoder.parent / "ip-adapter-plus_sd15.safetensors", state)
    export_checkpoint(path, tmp_path / "bundle")
    bundle = Bundle.open(tmp_path / "bundle")
    manifest = bundle.manifest
    assert (manifest.kind, manifest.name) == ("ip-adapter", "ip-adapter-plus_sd15")
    assert list(manifest.networks) == ["image_encoder", "image_projection", "image_keys_values"]
    for report in manifest.parity.values():
        assert report["float32"]["max_relative"] <= 1e-4
        assert 0.9995 <= report["float16"]["min_cosine"] < 1
    assert len(list(verify_against(bundle, str(path)))) == 6


def test_the_encoder_is_found_beside_or_given_and_has_to_fit(tmp_path: Path) -> None:
    state = ip_adapter(1, "plain", [32], 32)
    path = write_ip_adapter(tmp_path / "sdxl_models" / "ip.safetensors", state)
    with pytest.raises(CheckpointError, match=r"holds no image encoder; name its folder, .* with --image-encoder"):
        load_checkpoint(path)
    write_image_encoder(tmp_path / "sdxl_models" / "image_encoder", projection_dim=24)
    with pytest.raises(CheckpointError, match=r"reads image embeddings of width 20, and .*image_encoder gives 24"):
        load_checkpoint(path)
    other = write_image_encoder(tmp_path / "models" / "image_encoder")
    assert loaded(path)[0].config.projection_dim == 20
    assert loaded(path, image_encoder=other)[0].config.projection_dim == 20
    assert loaded(path, image_encoder=other.parent)[0].config.projection_dim == 20
    with pytest.raises(InputError, match="has no averaged weights; export without --ema"):
        load_checkpoint(path, ema=True)


def test_an_image_encoder_is_for_ip_adapters_alone(tiny_checkpoint: Path, encoder: Path) -> None:
    with pytest.raises(InputError, match="is no file of an IP-Adapter, which alone has an image encoder"):
        load_checkpoint(tiny_checkpoint, image_encoder=encoder)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ip_adapter.0.to_q_lora.down.weight": (4, 32)}, UnsupportedArchitectureError, "an IP-Adapter FaceID, which"),
        ({"image_proj.perceiver_resampler.proj_in.weight": (8, 8)}, UnsupportedArchitectureError, "IP-Adapter FaceID"),
        ({"image_proj.proj.weight": None}, UnsupportedArchitectureError, "IP-Adapter FaceID, or one that is not known"),
        ({"image_proj.norm.weight": None}, CheckpointError, "1 missing: image_proj.norm.weight"),
        ({"image_proj.other": (1,)}, CheckpointError, "1 unexpected: image_proj.other"),
        ({"ip_adapter.1.to_v_ip.weight": None}, CheckpointError, "1 missing: ip_adapter.1.to_v_ip.weight"),
    ],
    ids=["FaceID", "FaceID Plus", "no projection", "missing", "unexpected", "no values"],
)
def test_what_is_no_such_adapter_is_named(
    tmp_path: Path, change: dict[str, Any], error: type[CalotypeError], message: str
) -> None:
    write_image_encoder(tmp_path / "image_encoder")
    state = ip_adapter(1, "plain", [32], 32)
    for name, shape in change.items():
        if shape is None:
            del state[name]
        else:
            state[name] = torch.zeros(shape)
    with pytest.raises(error, match=message) as caught:
        load_checkpoint(write_ip_adapter(tmp_path / "ip-adapter.bin", state))
    assert "\n" not in str(caught.value)
