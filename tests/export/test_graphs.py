"""The graphs of every family, against their modules and against transformers."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from calotype.export.checkpoint import Checkpoint
from calotype.export.families.sd import SD2
from calotype.export.families.sdxl import SDXL
from calotype.export.graphs import GraphPlan, vae_plans, vae_spec
from calotype.export.models.clip import TextEncoder, TextEncoderConfig
from calotype.export.models.tiny_autoencoder import TinyAutoencoder, TinyAutoencoderConfig
from calotype.export.models.unet import UNet, UNetConfig
from calotype.export.parity import check, run_graph, run_module
from calotype.export.precision import find_islands, measure, run_float16, write_float16
from calotype.export.sources import load_checkpoint
from calotype.export.tokenizer import Tokenizer
from calotype.export.tracing import write_graph, write_part
from calotype.export.weights import locate, write_weights

VOCABULARY = ["a", "b", "c", "<|startoftext|>", "<|endoftext|>"]
TEXT = TextEncoderConfig(
    vocab_size=len(VOCABULARY),
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=3,
    max_position_embeddings=12,
    projection_dim=20,
    eos_token_id=4,
)
UNET = UNetConfig(
    block_out_channels=(24,),
    down_block_types=("CrossAttnDownBlock2D",),
    up_block_types=("UpBlock2D",),
    layers_per_block=1,
    attention_head_dim=3,
    norm_num_groups=8,
    cross_attention_dim=24,
)


def tokenizer(pad: str) -> Tokenizer:
    vocab = json.dumps({token: index for index, token in enumerate(VOCABULARY)}).encode()
    return Tokenizer(vocab=vocab, merges=b"", pad_token=pad)


def tiny_vae() -> TinyAutoencoder:
    config = TinyAutoencoderConfig(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    return TinyAutoencoder(config).eval()


def checkpoint(family: str) -> Checkpoint:
    """Random weights: SDXL whole; SD 2's encoder with an inpainting UNet distilled for LCM; an autoencoder alone."""
    torch.manual_seed(0)
    source = {"layout": "diffusers", "name": family}
    if family == "vae":
        vae = tiny_vae()
        return Checkpoint(
            family="vae", components={"vae": vae}, graphs=tuple(vae_plans(vae)), vae=vae_spec(vae), source=source
        )
    if family == "sd2":
        return SD2.checkpoint(
            vae=tiny_vae(),
            towers=[TextEncoder(dataclasses.replace(TEXT, hidden_act="gelu")).eval()],
            tokenizers=[tokenizer("a")],
            unet=UNet(
                dataclasses.replace(UNET, in_channels=9, use_linear_projection=True, time_cond_proj_dim=10)
            ).eval(),
            source=source,
        )
    sdxl = dataclasses.replace(
        UNET,
        cross_attention_dim=48,
        use_linear_projection=True,
        transformer_layers_per_block=2,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=20 + 6 * 8,
    )
    second = dataclasses.replace(TEXT, hidden_act="gelu", with_projection=True)
    return SDXL.checkpoint(
        vae=tiny_vae(),
        towers=[TextEncoder(TEXT).eval(), TextEncoder(second).eval()],
        tokenizers=[tokenizer("<|endoftext|>"), tokenizer("a")],
        unet=UNet(sdxl).eval(),
        source=source,
    )


@pytest.fixture(scope="module", params=["sd2", "sdxl", "vae"])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[GraphPlan], Path]:
    """All graphs of a checkpoint in a folder, float32 in computation, over weights in float16."""
    folder = tmp_path_factory.mktemp(request.param)
    made = list(checkpoint(request.param).graphs)
    for plan in made:
        weights = folder / f"{plan.component}.safetensors"
        if not weights.exists():
            write_weights(plan.module.get_submodule("model"), weights, torch.float16)
        write(plan, folder)
    return made, folder


def write(plan: GraphPlan, folder: Path) -> Path:
    """The plan's graph in ``folder``, beside its weights."""
    path = folder / f"{plan.network}.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if plan.whole is None:
            write_graph(plan, folder / f"{plan.component}.safetensors", path)
        else:
            write_part(folder / f"{plan.whole}.onnx", plan, path)
    return path


def test_every_graph_equals_its_module_in_both_precisions(written: tuple[list[GraphPlan], Path]) -> None:
    made, folder = written
    errors = []
    for plan in made:
        graph, cases = folder / f"{plan.network}.onnx", plan.cases()
        expected = run_module(plan, cases)
        errors.append(check(plan, "float32", graph, run_graph(graph, cases), expected).max_relative)
        islands = find_islands(graph, measure(graph, cases))
        write_float16(graph, islands, folder / f"{plan.network}.fp16.onnx")
        run_graph(folder / f"{plan.network}.fp16.onnx", cases)
        assert 1e-5 < check(plan, "float16", graph, run_float16(graph, islands, cases), expected).max_relative < 0.02
    assert max(errors) > 0  # a convolution alone can be the same in both


@pytest.mark.parametrize("written", ["sd2", "sdxl"], indirect=True)
def test_the_parts_of_the_unet_compute_the_same_bits_as_the_whole(written: tuple[list[GraphPlan], Path]) -> None:
    made, folder = written
    inputs = next(plan for plan in made if plan.network == "unet").cases()
    whole, deep = (run_graph(folder / f"{name}.onnx", inputs) for name in ("unet", "unet_deep"))
    shallow = {case: given | {"deep_feature": deep[case][1]} for case, given in inputs.items()}
    for case, (noise_pred,) in run_graph(folder / "unet_shallow.onnx", shallow).items():
        assert noise_pred.tobytes() == whole[case][0].tobytes() == deep[case][0].tobytes()
    sizes = {
        plan.network: len(onnx.load(folder / f"{plan.network}.onnx", load_external_data=False).graph.node)
        for plan in made
    }
    assert sizes["unet_shallow"] < sizes["unet"] == sizes["unet_deep"]


def test_names_and_shapes_are_the_plan_s(written: tuple[list[GraphPlan], Path]) -> None:
    made, folder = written
    for plan in made:
        graph = onnx.load(folder / f"{plan.network}.onnx", load_external_data=False).graph
        for specs, values in ((plan.inputs, graph.input), (plan.outputs, graph.output)):
            assert [spec.name for spec in specs] == [value.name for value in values]
            for spec, value in zip(specs, values, strict=True):
                assert [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim] == list(spec.shape)


def test_every_weight_is_one_of_the_file_s_and_nothing_else_is_large(written: tuple[list[GraphPlan], Path]) -> None:
    made, folder = written
    used: dict[str, set[str]] = {}
    for plan in made:
        for path in (folder / f"{plan.network}.onnx", folder / f"{plan.network}.fp16.onnx"):
            for tensor in onnx.load(path, load_external_data=False).graph.initializer:
                if not tensor.external_data:
                    assert len(tensor.raw_data) <= 128, tensor.name
                    continue
                entry = {item.key: item.value for item in tensor.external_data}
                place = locate(folder / entry["location"])[tensor.name]
                assert (int(entry["offset"]), int(entry["length"])) == (place.offset, place.length)
                used.setdefault(plan.component, set()).add(tensor.name)
    for plan in made:
        parameters = dict(plan.module.get_submodule("model").named_parameters())
        assert used[plan.component] <= parameters.keys()
        # SDXL leaves the last layer of its first encoder out, and with it the last norm.
        assert plan.network == "text_encoder" or used[plan.component] == parameters.keys()
        header = min(place.offset for place in locate(folder / f"{plan.component}.safetensors").values())
        size = (folder / f"{plan.component}.safetensors").stat().st_size
        assert size - header == 2 * sum(parameter.numel() for parameter in parameters.values())


@pytest.mark.parametrize("written", ["sd2", "sdxl"], indirect=True)
def test_text_encoders_equal_transformers(written: tuple[list[GraphPlan], Path]) -> None:
    made, folder = written
    for plan in made:
        if plan.network.startswith("text_encoder"):
            ours = plan.module.get_submodule("model")
            for case, inputs in plan.cases().items():
                got = run_graph(folder / f"{plan.network}.onnx", {case: inputs})[case]
                for wanted, output in zip(transformers_outputs(ours, inputs), got, strict=True):
                    np.testing.assert_allclose(output, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def transformers_outputs(ours: Any, inputs: dict[str, Any]) -> list[Any]:
    """As diffusers' pipelines take them: normalised for SD 1 and 2, the last but one and the pooled for SDXL."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers

        pooled = ours.text_projection is not None
        kind = transformers.CLIPTextModelWithProjection if pooled else transformers.CLIPTextModel
        settings = {key: value for key, value in dataclasses.asdict(ours.config).items() if key != "with_projection"}
        model = kind(transformers.CLIPTextConfig(**settings)).eval()
        state = ours.state_dict()
        if not pooled:
            state = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
        model.load_state_dict(state)
        model.resize_token_embeddings(len(VOCABULARY) + len(inputs["extra_embeddings"]), mean_resizing=False)
        table = model.get_input_embeddings().weight.data
        table[len(VOCABULARY) :] = torch.from_numpy(inputs["extra_embeddings"])
        with torch.no_grad():
            out = model(input_ids=torch.from_numpy(inputs["input_ids"]), output_hidden_states=True)
            skip = int(inputs["clip_skip"][0])
            if ours.config.hidden_act == "gelu" and not pooled:
                return [ours.text_model.final_layer_norm(out.hidden_states[-(skip + 1)]).numpy()]
            return [out.hidden_states[-(skip + 2)].numpy()] + ([out.text_embeds.numpy()] if pooled else [])


SLOW_FAMILIES = [pytest.param(family, None, marks=pytest.mark.slow) for family in ("sd1", "sd2", "sdxl")]


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a_folder_and_a_single_file_of_the_same_weights_have_the_same_files(
    family: str, folder: Callable[[str], Path], single_file: Callable[[str], Path], tmp_path: Path
) -> None:
    ours, theirs = both_layouts(family, folder, single_file, tmp_path)
    for plan, other in zip(ours, theirs, strict=True):
        assert plan.spec(("float32",)) == other.spec(("float32",))
    for name in {plan.component for plan in ours}:
        weights = [(tmp_path / layout / f"{name}.safetensors").read_bytes() for layout in ("ours", "theirs")]
        assert weights[0] == weights[1], name


# SD 2's text encoder, whose fused attention projections were split, and every network of every family.
@pytest.mark.parametrize(("family", "only"), [("sd2", "text_encoder"), *SLOW_FAMILIES])
def test_a_folder_and_a_single_file_of_the_same_weights_compute_the_same_bits(
    family: str, only: str | None, folder: Callable[[str], Path], single_file: Callable[[str], Path], tmp_path: Path
) -> None:
    outputs: list[dict[str, list[bytes]]] = []
    for made, layout in zip(both_layouts(family, folder, single_file, tmp_path), ("ours", "theirs"), strict=True):
        outputs.append({})
        for plan in made:
            if only in (None, plan.network):
                graph = write(plan, tmp_path / layout)
                for case, arrays in run_graph(graph, plan.cases()).items():
                    outputs[-1][f"{plan.network} {case}"] = [array.tobytes() for array in arrays]
    assert len({name.split()[0] for name in outputs[0]}) == (1 if only else 8 if family == "sdxl" else 7)
    assert outputs[0] == outputs[1]


def both_layouts(
    family: str, folder: Callable[[str], Path], single_file: Callable[[str], Path], target: Path
) -> list[list[GraphPlan]]:
    """The graphs to be made from either layout, and their weights in the folders "ours" and "theirs"."""
    found = []
    for source, layout in ((folder(family), "ours"), (single_file(family), "theirs")):
        made = list(load_checkpoint(source).graphs)
        (target / layout).mkdir()
        for plan in made:
            weights = target / layout / f"{plan.component}.safetensors"
            if not weights.exists():
                write_weights(plan.module.get_submodule("model"), weights, torch.float16)
        found.append(made)
    return found
