"""PyTorch modules to ONNX graphs whose weights are the tensors of a ``.safetensors`` file, not copies of them.

Opset 23: attention, group and layer normalisation and GELU each leave as one node, which runtimes have fused kernels
for. Nothing that reads a weight is folded, since the folded constant would be a second copy of it.
"""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir
import onnxscript.optimizer
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, RemoveUnusedNodesPass
from torch import Tensor, nn

from calotype.export.models.autoencoder import Autoencoder
from calotype.export.models.clip import TextEncoder
from calotype.export.models.unet import UNet
from calotype.export.weights import locate
from calotype.runtime.spec import ModelSpec, TensorSpec

OPSET = 23
PREFIX = "model."


class TextEncoderGraph(nn.Module):
    """Ids and ``clip_skip`` to one layer's normalised hidden states."""

    def __init__(self, model: TextEncoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, clip_skip: Tensor) -> Tensor:
        # (B, T), (1,) -> (B, T, C)
        text = self.model.text_model
        states = torch.stack(text(input_ids))
        chosen = states.index_select(0, states.shape[0] - 1 - clip_skip)[0]
        out: Tensor = text.final_layer_norm(chosen)
        return out


class UNetGraph(nn.Module):
    """The UNet under its prefix."""

    def __init__(self, model: UNet) -> None:
        super().__init__()
        self.model = model

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        out: Tensor = self.model(sample, timestep, encoder_hidden_states)
        return out


class VaeDecoderGraph(nn.Module):
    """The half of the autoencoder that draws."""

    def __init__(self, model: Autoencoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, latents: Tensor) -> Tensor:
        return self.model.decode(latents)


class VaeEncoderGraph(nn.Module):
    """The half of the autoencoder that reads."""

    def __init__(self, model: Autoencoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        return self.model.encode(image)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraphPlan:
    """One graph to be made: the module, its inputs and outputs, and the component whose weights it reads."""

    network: str
    component: str
    module: nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def spec(self) -> ModelSpec:
        """What the manifest says of it."""
        return ModelSpec(
            inputs=self.inputs,
            outputs=self.outputs,
            graphs={"float32": f"{self.network}.fp32.onnx"},
            weights=(f"{self.component}.safetensors",),
        )


def plans(text_encoder: TextEncoder, unet: UNet, vae: Autoencoder) -> list[GraphPlan]:
    """The four graphs of a Stable Diffusion 1.x or 2.x model."""
    text, latent, factor = text_encoder.config, vae.config.latent_channels, vae.config.downscale
    pixels = (f"{factor}*height", f"{factor}*width")
    image = _float("image", "batch", vae.config.out_channels, *pixels)
    latents = ("batch", latent, "height", "width")
    return [
        GraphPlan(
            network="text_encoder",
            component="text_encoder",
            module=TextEncoderGraph(text_encoder),
            inputs=(
                TensorSpec(name="input_ids", dtype="int64", shape=("batch", text.max_position_embeddings)),
                TensorSpec(name="clip_skip", dtype="int64", shape=(1,)),
            ),
            outputs=(_float("hidden_states", "batch", text.max_position_embeddings, text.hidden_size),),
        ),
        GraphPlan(
            network="unet",
            component="unet",
            module=UNetGraph(unet),
            inputs=(
                _float("sample", "rows", unet.config.in_channels, "height", "width"),
                _float("timestep", "rows"),
                _float("encoder_hidden_states", "rows", "tokens", unet.config.cross_attention_dim),
            ),
            outputs=(_float("noise_pred", "rows", unet.config.out_channels, "height", "width"),),
        ),
        GraphPlan(
            network="vae_decoder",
            component="vae",
            module=VaeDecoderGraph(vae),
            inputs=(_float("latents", *latents),),
            outputs=(image,),
        ),
        GraphPlan(
            network="vae_encoder",
            component="vae",
            module=VaeEncoderGraph(vae),
            inputs=(image,),
            outputs=(_float("mean", *latents), _float("logvar", *latents)),
        ),
    ]


def example_inputs(plan: GraphPlan, sizes: Mapping[str, int], seed: int = 0) -> tuple[Tensor, ...]:
    """Random inputs: normal latents, timesteps over the whole range, ids over the whole vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    inputs: list[Tensor] = []
    for spec in plan.inputs:
        shape = spec.resolve(sizes)
        if spec.name == "input_ids":
            vocabulary = plan.module.get_parameter("model.text_model.embeddings.token_embedding.weight").shape[0]
            inputs.append(torch.randint(0, vocabulary, shape, generator=generator))
        elif spec.name == "clip_skip":
            inputs.append(torch.zeros(shape, dtype=torch.int64))
        elif spec.name == "timestep":
            inputs.append(torch.linspace(0, 999, shape[0]))
        else:
            inputs.append(torch.randn(shape, generator=generator))
    return tuple(inputs)


def write_graph(plan: GraphPlan, weights: Path, path: Path) -> None:
    """Trace the module and write its graph, float32 in computation, beside the weights file it points into."""
    sizes = {"batch": 2, "rows": 2, "tokens": 7, "height": 8, "width": 16}
    dynamic = {
        spec.name: {axis: torch.export.Dim.DYNAMIC for axis, size in enumerate(spec.shape) if not isinstance(size, int)}
        for spec in plan.inputs
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside the exporter, which nobody here can act on
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            plan.module,
            example_inputs(plan, sizes),
            dynamo=True,
            opset_version=OPSET,
            optimize=False,
            verbose=False,
            input_names=[spec.name for spec in plan.inputs],
            output_names=[spec.name for spec in plan.outputs],
            dynamic_shapes=dynamic,
        )
    assert program is not None
    model = program.model
    model.graph.name = plan.network
    weight_names = {name for name in model.graph.initializers if name.startswith(PREFIX)}
    onnxscript.optimizer.fold_constants(model, should_fold=lambda node: _may_fold(node, weight_names))
    RemoveUnusedNodesPass()(model)
    ClearMetadataAndDocStringPass()(model)  # stack traces, with the paths of the machine that exported
    _point_into(model, weights)
    for value in (*model.graph.inputs, *model.graph.outputs):
        specs = {spec.name: spec for spec in (*plan.inputs, *plan.outputs)}
        if value.name in specs:
            value.shape = ir.Shape(list(specs[value.name].shape))
    ir.save(model, path)


def _may_fold(node: ir.Node, weights: set[str]) -> bool | None:
    """False keeps a node that reads a weight; None leaves the choice to the optimizer."""
    return False if any(value is not None and value.name in weights for value in node.inputs) else None


def _point_into(model: ir.Model, weights: Path) -> None:
    """Make each weight an external tensor in ``weights``, cast to float32 where it is stored in less."""
    locations = locate(weights)
    stored = ir.DataType.FLOAT16 if _is_half(weights) else ir.DataType.FLOAT
    graph = model.graph
    casts = []
    for name, value in list(graph.initializers.items()):
        if not name.startswith(PREFIX):
            continue
        key = name.removeprefix(PREFIX)
        del graph.initializers[name]
        uses = list(value.uses())
        if not uses:
            continue
        place = locations[key]
        tensor = ir.ExternalTensor(
            weights.name,
            place.offset,
            place.length,
            stored,
            shape=ir.Shape(value.shape or []),
            name=key,
            base_dir=str(weights.parent),
        )
        initializer = ir.Value(name=key, type=ir.TensorType(stored), shape=tensor.shape, const_value=tensor)
        graph.initializers[key] = initializer
        replacement = initializer
        if stored != ir.DataType.FLOAT:
            cast = ir.node("Cast", [initializer], {"to": ir.DataType.FLOAT})
            cast.outputs[0].name = f"{key}.float32"
            cast.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
            cast.outputs[0].shape = tensor.shape
            replacement = cast.outputs[0]
            casts.append(cast)
        for user, index in uses:
            user.replace_input_with(index, replacement)
    if casts:
        graph.insert_before(graph[0], casts)


def _is_half(weights: Path) -> bool:
    from safetensors import safe_open

    with safe_open(weights, framework="pt") as file:
        return bool(file.get_slice(next(iter(file.keys()))).get_dtype() == "F16")


def _float(name: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name=name, dtype="float32", shape=shape)
