"""LoRA files of every layout, merged, against diffusers' and PEFT's own loading and fusing."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from calotype.runtime.adapters.lora import Lora, merge
from calotype.runtime.errors import InputError
from calotype.runtime.pipeline import Pipeline

RANK = 3
UNET = (
    "conv_in",
    "down_blocks.0.attentions.0.proj_in",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0",
    "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj",
    "down_blocks.0.downsamplers.0.conv",
    "up_blocks.1.resnets.1.conv1",
    "up_blocks.1.resnets.0.conv_shortcut",
    "up_blocks.0.resnets.0.time_emb_proj",
)
TEXT = (
    "text_model.encoder.layers.0.self_attn.q_proj",
    "text_model.encoder.layers.2.self_attn.out_proj",
    "text_model.encoder.layers.1.mlp.fc1",
)
# What kohya's trainer calls modules of SDXL's UNet, and what they are called today.
ORIGINAL = {
    "input_blocks_0_0": "conv_in",
    "input_blocks_1_0_in_layers_2": "down_blocks.0.resnets.0.conv1",
    "input_blocks_2_0_out_layers_3": "down_blocks.0.resnets.1.conv2",
    "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks_4_1_proj_in": "down_blocks.1.attentions.0.proj_in",
    "input_blocks_4_0_skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
    "input_blocks_5_1_transformer_blocks_1_attn2_to_v": "down_blocks.1.attentions.1.transformer_blocks.1.attn2.to_v",
    "middle_block_0_emb_layers_1": "mid_block.resnets.0.time_emb_proj",
    "middle_block_1_transformer_blocks_0_attn1_to_out_0": "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0",
    "middle_block_2_in_layers_2": "mid_block.resnets.1.conv1",
    "output_blocks_2_1_transformer_blocks_0_ff_net_2": "up_blocks.0.attentions.2.transformer_blocks.0.ff.net.2",
    "output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks_5_0_in_layers_2": "up_blocks.1.resnets.2.conv1",
    "time_embed_2": "time_embedding.linear_2",
    "label_emb_0_0": "add_embedding.linear_1",
    "out_2": "conv_out",
}
State = dict[str, NDArray[Any]]


def numpy_state(module: torch.nn.Module) -> State:
    return {name: tensor.numpy().copy() for name, tensor in module.state_dict().items()}


def with_prefix(state: State) -> State:
    """As files on disk have a text encoder; transformers 5 leaves the prefix out in memory."""
    names = {
        name: name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}" for name in state
    }
    return {names[name]: value for name, value in state.items()}


def weights_of(pipeline: Any) -> dict[str, State]:
    components = {name: getattr(pipeline, name, None) for name in ("unet", "text_encoder", "text_encoder_2")}
    states = {name: numpy_state(module) for name, module in components.items() if module is not None}
    return {name: state if name == "unet" else with_prefix(state) for name, state in states.items()}


def pair(weight: NDArray[Any], rng: np.random.Generator) -> tuple[NDArray[Any], NDArray[Any]]:
    """Random ``down`` and ``up`` for a weight."""
    down = rng.standard_normal((RANK, *weight.shape[1:]), np.float32)
    return down, rng.standard_normal((weight.shape[0], RANK, *(1,) * (weight.ndim - 2)), np.float32)


def kohya(weights: Mapping[str, State], modules: Mapping[str, tuple[str, str]]) -> State:
    """A file of kohya's layout; ``modules`` maps its names to (network, module).

    One alpha for all: diffusers takes the most frequent one for all attention projections.
    """
    rng = np.random.default_rng(1)
    file: State = {}
    for name, (component, module) in modules.items():
        down, up = pair(weights[component][f"{module}.weight"], rng)
        file |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        file[f"{name}.alpha"] = np.array(1.5, np.float32)
    return file


def dotted(weights: Mapping[str, State], down: str, up: str, rename: Callable[[str], str] = str) -> State:
    """A file of one of diffusers' layouts."""
    rng = np.random.default_rng(2)
    file: State = {}
    for component, modules in (("unet", UNET), ("text_encoder", TEXT)):
        for module in modules:
            values = pair(weights[component][f"{module}.weight"], rng)
            file |= {f"{component}.{rename(module)}{part}": v for part, v in zip((down, up), values, strict=True)}
    return file


def sd1_kohya_names() -> dict[str, tuple[str, str]]:
    names = {f"lora_unet_{module.replace('.', '_')}": ("unet", module) for module in UNET}
    return names | {f"lora_te_{module.replace('.', '_')}": ("text_encoder", module) for module in TEXT}


@pytest.fixture
def sd1(tiny_checkpoint: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers

        return diffusers.StableDiffusionPipeline.from_pretrained(tiny_checkpoint)


@pytest.fixture
def sdxl() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers
        import transformers

        torch.manual_seed(1)
        text = transformers.CLIPTextConfig(
            vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4
        )
        return diffusers.StableDiffusionXLPipeline(
            vae=None,
            text_encoder=transformers.CLIPTextModel(text),
            text_encoder_2=transformers.CLIPTextModelWithProjection(text),
            tokenizer=None,
            tokenizer_2=None,
            unet=diffusers.UNet2DConditionModel(
                sample_size=8,
                block_out_channels=(32, 64),
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                layers_per_block=2,
                attention_head_dim=4,
                transformer_layers_per_block=(1, 2),
                cross_attention_dim=64,
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=80,
            ),
            scheduler=diffusers.DDIMScheduler(),
        )


def fused(pipeline: Any, *files: tuple[Path, float]) -> dict[str, State]:
    """What diffusers makes of the weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number, (path, scale) in enumerate(files):
            pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name=f"a{number}")
            pipeline.set_adapters([f"a{number}"], [scale])
            pipeline.fuse_lora(components=list(weights_of(pipeline)))
            pipeline.unload_lora_weights()
    return weights_of(pipeline)


def assert_equal(before: dict[str, State], expected: dict[str, State], merged: Mapping[str, Mapping[str, Any]]) -> None:
    """``merged`` and nothing else is what diffusers changed, by the same amount."""
    for component, state in expected.items():
        own = merged.get(component, {})
        for name, value in state.items():
            if np.array_equal(value, before[component][name]):
                assert name not in own
            else:
                assert own[name].dtype == value.dtype
                np.testing.assert_allclose(own[name], value, rtol=0, atol=1e-5 * np.abs(value).max(), err_msg=name)


def saved(path: Path, state: State, metadata: dict[str, str] | None = None) -> Path:
    save_file(state, path, metadata)
    return path


def test_kohya_equals_diffusers(sd1: Any, tmp_path: Path) -> None:
    before = weights_of(sd1)
    path = saved(tmp_path / "a.safetensors", kohya(before, sd1_kohya_names()))
    merged = merge([Lora(path=path, scale=0.8)], before)
    assert sum(map(len, merged.values())) == len(UNET) + len(TEXT)
    assert_equal(before, fused(sd1, (path, 0.8)), merged)


def test_kohya_in_the_original_naming_equals_diffusers(sdxl: Any, tmp_path: Path) -> None:
    before = weights_of(sdxl)
    names = {f"lora_unet_{name}": ("unet", module) for name, module in ORIGINAL.items()}
    for prefix, component in (("te1", "text_encoder"), ("te2", "text_encoder_2")):
        names |= {f"lora_{prefix}_{module.replace('.', '_')}": (component, module) for module in TEXT}
    path = saved(tmp_path / "a.safetensors", kohya(before, names))
    assert_equal(before, fused(sdxl, (path, -0.5)), merge([Lora(path=path, scale=-0.5)], before))


def old_diffusers(module: str) -> str:
    module = re.sub(r"\.(attn\d)\.", r".\1.processor.", module).replace("to_out.0", "to_out")
    return re.sub(r"self_attn\.(q|out)_proj", r"self_attn.to_\1", module)


@pytest.mark.parametrize(
    ("down", "up", "rename", "chosen"),
    [
        (".lora_A.weight", ".lora_B.weight", str, ""),
        (".lora.down.weight", ".lora.up.weight", str, "unet"),
        (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight", str, "text_encoder"),
        ("_lora.down.weight", "_lora.up.weight", old_diffusers, "attn"),
    ],
)
def test_diffusers_layouts_equal_diffusers(
    sd1: Any, tmp_path: Path, down: str, up: str, rename: Callable[[str], str], chosen: str
) -> None:
    before = weights_of(sd1)
    # Diffusers itself knows each of the older layouts for some modules alone.
    state = {key: value for key, value in dotted(before, down, up, rename).items() if chosen in key}
    path = saved(tmp_path / "a.safetensors", state)
    merged = merge([Lora(path=path, scale=0.7)], before)
    assert sum(map(len, merged.values())) == len(state) // 2
    assert_equal(before, fused(sd1, (path, 0.7)), merged)


def test_several_at_once_equal_diffusers(sd1: Any, tmp_path: Path) -> None:
    before = weights_of(sd1)
    first = saved(tmp_path / "a.safetensors", kohya(before, sd1_kohya_names()))
    second = saved(tmp_path / "b.safetensors", dotted(before, ".lora_A.weight", ".lora_B.weight"))
    merged = merge([Lora(path=first, scale=0.8), Lora(path=second, scale=-0.3)], before)
    assert_equal(before, fused(sd1, (first, 0.8), (second, -0.3)), merged)


@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_alphas_in_the_header_equal_diffusers(sd1: Any, tmp_path: Path, rank_stabilised: bool) -> None:
    before = weights_of(sd1)
    state = {k: v for k, v in dotted(before, ".lora_A.weight", ".lora_B.weight").items() if k.startswith("unet.")}
    settings = {
        "unet.r": RANK,
        "unet.lora_alpha": 7,
        "unet.alpha_pattern": {"attn2.to_k": 2},
        "unet.use_rslora": rank_stabilised,
        "unet.target_modules": list(UNET),
    }
    path = saved(tmp_path / "a.safetensors", state, {"lora_adapter_metadata": json.dumps(settings)})
    assert_equal(before, fused(sd1, (path, 1.0)), merge([Lora(path=path)], before))


@pytest.mark.parametrize("kernel", [1, 3])
def test_locon_with_a_middle_is_three_convolutions(tmp_path: Path, kernel: int) -> None:
    rng = np.random.default_rng(5)
    down, mid, up = (
        rng.standard_normal(shape, np.float32) for shape in ((2, 5, 1, 1), (3, 2, kernel, kernel), (7, 3, 1, 1))
    )
    base = rng.standard_normal((7, 5, kernel, kernel), np.float32)
    name = "lora_unet_conv_in"
    state = {f"{name}.lora_down.weight": down, f"{name}.lora_mid.weight": mid, f"{name}.lora_up.weight": up}
    path = saved(tmp_path / "a.safetensors", state | {f"{name}.alpha": np.array(1.0, np.float32)})
    merged = merge([Lora(path=path, scale=0.6)], {"unet": {"conv_in.weight": base}})["unet"]["conv_in.weight"]
    x = torch.randn(1, 5, 6, 6)
    expected = x
    for weight in (down, mid, up):
        expected = torch.nn.functional.conv2d(expected, torch.from_numpy(weight))
    expected = torch.nn.functional.conv2d(x, torch.from_numpy(base)) + 0.6 * (1.0 / 2) * expected
    np.testing.assert_allclose(torch.nn.functional.conv2d(x, torch.from_numpy(merged)), expected, rtol=0, atol=1e-4)


def linear(path: Path, *, shape: tuple[int, int] = (4, 6), dtype: Any = np.float32, **changes: Any) -> Path:
    """A LoRA of one linear layer, ``conv_in`` by name."""
    rng = np.random.default_rng(6)
    parts = {
        "lora_down.weight": rng.standard_normal((2, shape[1])).astype(dtype),
        "lora_up.weight": rng.standard_normal((shape[0], 2)).astype(dtype),
        "alpha": np.array(3.0, dtype),
        **changes,
    }
    return saved(path, {f"lora_unet_conv_in.{part}": value for part, value in parts.items() if value is not None})


def test_each_module_has_its_own_alpha_and_merging_is_in_float32(tmp_path: Path) -> None:
    # Against the definition, since diffusers is not exact for mixed alphas: W + scale · alpha / rank · up @ down.
    weight = np.random.default_rng(7).standard_normal((4, 6)).astype(np.float16)
    weight.flags.writeable = False
    path = linear(tmp_path / "a.safetensors", dtype=np.float16)
    got = merge([Lora(path=path, scale=0.9)], {"unet": {"conv_in.weight": weight}})["unet"]["conv_in.weight"]
    down, up = (torch.from_numpy(value) for value in safetensors_pair(path))
    expected = torch.from_numpy(weight.copy()).double() + 0.9 * 3 / 2 * (up.double() @ down.double())
    assert got.dtype == np.float16
    np.testing.assert_allclose(got, expected.half(), rtol=1e-3, atol=0)
    assert np.mean(got == expected.half().numpy()) > 0.9  # in float16 half of them would differ


def safetensors_pair(path: Path) -> tuple[NDArray[Any], NDArray[Any]]:
    state = load_file(path)
    return state["lora_unet_conv_in.lora_down.weight"], state["lora_unet_conv_in.lora_up.weight"]


def test_none_changes_nothing() -> None:
    assert merge([], {"unet": {"conv_in.weight": np.ones((2, 2))}}) == {}


@pytest.mark.parametrize(
    ("text", "path", "scale"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.8", "a.safetensors", 0.8),
        ("b:c/a.safetensors:-1", "b:c/a.safetensors", -1.0),
        ("C:/a.safetensors", "C:/a.safetensors", 1.0),
        ("a:0", "a", 0.0),
    ],
)
def test_file_and_scale_in_one_text(text: str, path: str, scale: float) -> None:
    assert Lora.parse(text) == Lora(path=Path(path), scale=scale)


def refused(path: Path, message: str, *, scale: float = 1.0, shape: tuple[int, ...] = (4, 6)) -> None:
    weights = {"unet": {"conv_in.weight": np.ones(shape, np.float16), "norm.weight": np.ones(4, np.float16)}}
    with pytest.raises(InputError, match=message) as caught:
        merge([Lora(path=path, scale=scale)], weights)
    assert "\n" not in str(caught.value)


def test_one_for_another_family_is_one_line(sd1: Any, sdxl: Any, tmp_path: Path) -> None:
    names = {f"lora_unet_{name}": ("unet", module) for name, module in ORIGINAL.items()}
    path = saved(tmp_path / "xl.safetensors", kohya(weights_of(sdxl), names))
    with pytest.raises(InputError, match=r"xl\.safetensors does not fit this model; 8 keys match nothing: ") as caught:
        merge([Lora(path=path)], weights_of(sd1))
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(" of (64, 3) by (3, 256) on (32, 128); use one made for its family")
    merge([Lora(path=path)], weights_of(sdxl))


def test_many_strange_keys_are_counted(tmp_path: Path) -> None:
    state = {f"unet.block_{n}.lora_{part}.weight": np.ones((4, 4), np.float32) for n in range(30) for part in "AB"}
    refused(saved(tmp_path / "a.safetensors", state), r"30 keys match nothing: unet\.block_0, .* and 22 more; use one")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_up.weight": None}, r"lacks some of the tensors of 'lora_unet_conv_in'; take"),
        ({"alpha": np.ones(2, np.float32)}, r"alpha or scalar of lora_unet_conv_in that is not one number"),
        ({"lora_down.weight": np.ones(6, np.float32)}, r"have other shapes: lora_unet_conv_in"),
        ({"lora_up.weight": np.ones((4, 3), np.float32)}, r"lora_unet_conv_in of \(4, 3\) by \(2, 6\) on \(4, 6\)"),
        ({"lora_down.weight": np.ones((0, 6), np.float32)}, r"have other shapes"),
        ({"lora_up.weight": np.full((4, 2), np.nan, np.float32)}, r"conv_in\.weight is beyond what float16 holds"),
        ({"lora_up.weight": np.full((4, 2), 1e6, np.float32)}, r"is beyond what float16 holds; use a smaller scale"),
        ({"hada_w1_a": np.ones((4, 2), np.float32)}, r"lacks some of the tensors of 'lora_unet_conv_in'"),
        ({"lokr_w1": np.ones((2, 2), np.float32)}, r"lacks some of the tensors of 'lora_unet_conv_in'"),
        ({"rescale": np.ones(4, np.float32)}, r"lacks some of the tensors of 'lora_unet_conv_in'"),
        ({"dora_scale": np.ones(5, np.float32)}, r"\(4, 2\) by \(2, 6\) and \(5,\) on \(4, 6\)"),
        ({"diff": np.ones(4, np.float32)}, r"have other shapes: lora_unet_conv_in of \(4,\) on \(4, 6\)"),
        ({"diff_b": np.ones(4, np.float32)}, r"lora_unet_conv_in of \(4,\) on a layer without bias"),
        ({"oft_blocks": np.ones((3, 2, 2), np.float32)}, r"lora_unet_conv_in of \(3, 2, 2\) on \(4, 6\)"),
        (
            {"oft_diag": np.ones(4, np.float32)},
            r"is OFT in LyCORIS's first layout, which is not supported; supported: ",
        ),
        ({"a1.weight": np.ones((4, 4), np.float32)}, r"is no LoRA but GLoRA, which is not supported; supported: LoRA"),
        ({"on_input": np.array(True)}, r"is no LoRA but IA3, which is not supported; supported: LoRA"),
        ({"mystery": np.ones(4, np.float32)}, r"1 keys match nothing: lora_unet_conv_in\.mystery; use"),
    ],
)
def test_a_file_that_cannot_be_merged_is_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    refused(linear(tmp_path / "a.safetensors", **changes), message)


def test_other_bad_files_and_scales(tmp_path: Path) -> None:
    refused(saved(tmp_path / "a.safetensors", {}), "holds no tensors; take the publisher's own")
    refused(tmp_path / "nothing.safetensors", "does not exist")
    refused(
        saved(tmp_path / "b.safetensors", {"lora_unet_norm.alpha": np.ones(1)}),
        "lacks some of the tensors of 'lora_unet_norm'",
    )
    state = {
        f"{prefix}conv_in.lora_{part}.weight": np.ones((4, 4), np.float32)
        for prefix in ("lora_unet_", "unet.")
        for part in ("down", "up")
    }
    refused(saved(tmp_path / "c.safetensors", state), "changes .* twice, under two names", shape=(4, 4))
    state = {f"unet.conv_in.lora_{part}.weight": np.ones((4, 4), np.float32) for part in "AB"}
    path = saved(tmp_path / "d.safetensors", state, {"lora_adapter_metadata": '{"unet.lora_alpha": "much"}'})
    refused(path, "cannot be used: could not convert")
    for scale in (float("nan"), float("inf")):
        with pytest.raises(InputError, match=r"has the scale (nan|inf); give a finite number"):
            Lora(path=path, scale=scale)


def test_pictures_equal_diffusers_and_the_model_comes_back(
    tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers

        reference = diffusers.StableDiffusionPipeline.from_pretrained(tiny_checkpoint, torch_dtype=torch.float16)
        reference.to(torch.float32).set_progress_bar_config(disable=True)
    before = weights_of(reference)
    first = saved(tmp_path / "a.safetensors", kohya(before, sd1_kohya_names()))
    second = saved(tmp_path / "b.safetensors", dotted(before, ".lora_A.weight", ".lora_B.weight"))
    a, b = Lora(path=first, scale=0.05), Lora(path=second, scale=0.1)
    noise = np.random.default_rng(1).standard_normal((1, 4, 16, 16), np.float32)
    settings: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "np"}

    def draw() -> NDArray[Any]:
        image: NDArray[Any] = pipeline("red apple", latents=noise, **settings).images[0]
        return image

    with Pipeline.load(tiny_bundle, "cpu") as pipeline:
        plain = draw()
        pipeline.set_loras([a])
        with_a = draw()
        pipeline.set_loras([b])
        with_b = draw()
        with pytest.raises(InputError, match="does not exist"):
            pipeline.set_loras([Lora(path=tmp_path / "nothing.safetensors")])
        np.testing.assert_array_equal(draw(), with_b)
        pipeline.set_loras([a])
        np.testing.assert_array_equal(draw(), with_a)
        pipeline.set_loras([])
        np.testing.assert_array_equal(draw(), plain)
    with Pipeline.load(tiny_bundle, "cpu", loras=[a]) as pipeline:
        np.testing.assert_array_equal(draw(), with_a)
    fused(reference, (first, 0.05))
    expected = reference("red apple", height=32, width=32, latents=torch.from_numpy(noise.copy()), **settings).images[0]
    assert -10 * math.log10(float(np.mean((with_a - expected) ** 2))) >= 50
    assert -10 * math.log10(float(np.mean((plain - expected) ** 2))) < 40
