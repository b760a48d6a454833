"""Graphs that are to be made: what each computes, its inputs and outputs, and whose weights it reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from calotype.export.models.autoencoder import Autoencoder
from calotype.export.models.clip import TextEncoder
from calotype.export.models.clip_vision import ImageEncoder
from calotype.export.models.controlnet import ControlNet
from calotype.export.models.controlnet_union import ControlNetUnionConfig
from calotype.export.models.flux2 import AXES, Flux2Transformer
from calotype.export.models.ip_adapter import IPAdapter
from calotype.export.models.qwen3 import Qwen3
from calotype.export.models.t2i_adapter import T2IAdapter
from calotype.export.models.tiny_autoencoder import TinyAutoencoder
from calotype.export.models.unet import UNet, UNetConfig, cross_attentions, feature_places, skip_connections
from calotype.export.tokenizer import Tokenizer
from calotype.runtime.bundle.manifest import PROMPTED, TokenizerSpec, VaeSpec
from calotype.runtime.bundle.parity import Inputs, Tokens, cases
from calotype.runtime.bundle.spec import ModelSpec, TensorSpec

PREFIX = "model."  # of a parameter's name in a traced graph
SIZE_IDS = 6  # SDXL: original size, crop and target size, two numbers each
SUFFIXES = {"float32": "fp32", "float16": "fp16"}


class _Prefixed(nn.Module):
    """A component under the prefix."""

    model: Any

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


class UNetGraph(_Prefixed):
    """The UNet's prediction, and the deep feature that the shallow part takes for most of it."""

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
        timestep_cond: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        out: tuple[Tensor, Tensor] = self.model.deep(
            sample, timestep, encoder_hidden_states, text_embeds, time_ids, timestep_cond
        )
        return out


class UNetPart(_Prefixed):
    """What a part of that graph computes, by the name of a method; it is not traced, so it need not name its inputs."""

    def __init__(self, model: UNet, method: str) -> None:
        super().__init__(model)
        self.method = method

    def forward(self, **inputs: Tensor) -> Tensor:
        out: Tensor = getattr(self.model, self.method)(**inputs)
        return out


class VaeDecoderGraph(_Prefixed):
    """The half of the autoencoder that draws."""

    def forward(self, latents: Tensor) -> Tensor:
        out: Tensor = self.model.decode(latents)
        return out


class TransformerGraph(_Prefixed):
    """A transformer over latents and a prompt, with reference pictures' tokens where they are given."""

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        reference_latents: Tensor | None = None,
        reference_positions: Tensor | None = None,
    ) -> Tensor:
        out: Tensor = self.model(sample, timestep, encoder_hidden_states, reference_latents, reference_positions)
        return out


class LanguageModelGraph(_Prefixed):
    """The hidden states of a language model that a transformer reads."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        out: Tensor = self.model(input_ids, attention_mask)
        return out


class ImageProjectionGraph(_Prefixed):
    """What an IP-Adapter reads of a picture as tokens."""

    def forward(self, image_embedding: Tensor) -> Tensor:
        out: Tensor = self.model.image_proj(image_embedding)
        return out


class ImageKeysValuesGraph(_Prefixed):
    """Those for every cross-attention."""

    def forward(self, image_tokens: Tensor) -> tuple[Tensor, ...]:
        out: tuple[Tensor, ...] = self.model.keys_and_values(image_tokens)
        return out


class VaeEncoderGraph(_Prefixed):
    """The half of the autoencoder that reads."""

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        out: tuple[Tensor, Tensor] = self.model.encode(image)
        return out


@dataclasses.dataclass(frozen=True, kw_only=True)
class Addition:
    """An input that is added inside a UNet's graph.

    Attributes:
        spec: the input.
        place: the number of the skip connection that it is added to, the outermost is 0; behind the last of them counts
            what comes out of the middle.
        onward: whether to what goes on from there, too, and not to the skip connection alone.
    """

    spec: TensorSpec
    place: int
    onward: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraphPlan:
    """One graph to be made: the module, its inputs and outputs, and the component whose weights it reads.

    ``whole`` is the network whose graph this one is a part of, by the names of its inputs and outputs; None is traced.
    With ``additions``, or ``image_prompts``, which cross-attentions read beside the prompt, it is more than a part;
    what is added to one place is in their order.
    """

    network: str
    component: str
    module: nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    tokens: Tokens | None = None
    max_clip_skip: int = 0
    whole: str | None = None
    additions: tuple[Addition, ...] = ()
    image_prompts: tuple[TensorSpec, ...] = ()

    def cases(self) -> dict[str, Inputs]:
        """The inputs it is tried on."""
        return cases(self.network, self.inputs, self.tokens, self.max_clip_skip)

    def spec(self, precisions: tuple[str, ...]) -> ModelSpec:
        """What the manifest says of it."""
        return ModelSpec(
            inputs=self.inputs,
            outputs=self.outputs,
            graphs={precision: f"{self.network}.{SUFFIXES[precision]}.onnx" for precision in precisions},
            weights=(f"{self.component}.safetensors",),
        )


def by_component(plans: Iterable[GraphPlan]) -> dict[str, list[GraphPlan]]:
    """The graphs that read the weights of each component."""
    components: dict[str, list[GraphPlan]] = {}
    for plan in plans:
        components.setdefault(plan.component, []).append(plan)
    return components


def tokenizer_spec(name: str, tokenizer: Tokenizer) -> TokenizerSpec:
    """The manifest's record of ``tokenizer``, whose files lie in the folder ``name``."""
    return TokenizerSpec(
        vocab=f"{name}/vocab.json",
        merges=f"{name}/merges.txt",
        max_length=tokenizer.max_length,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
        kind=tokenizer.kind,
        added_tokens=tokenizer.added_tokens,
    )


def text_encoder_plan(
    name: str, graph: Callable[[TextEncoder, int], nn.Module], encoder: TextEncoder, tokenizer: Tokenizer, unread: int
) -> GraphPlan:
    """Of the text encoder ``name``: the prompt in tokens of ``tokenizer``, as ``graph`` computes from them.

    ``graph`` gives the hidden states, whose last ``unread`` layers it passes over, and the pooled prompt behind them
    where the encoder has a projection.
    """
    config, length = encoder.config, tokenizer.max_length
    outputs = [float_spec("hidden_states", "batch", length, config.hidden_size)]
    if encoder.text_projection is not None:
        outputs.append(float_spec("text_embeds", "batch", config.projection_dim))
    tokens = Tokens.read(tokenizer.vocab, tokenizer_spec(name, tokenizer))
    return GraphPlan(
        network=name,
        component=name,
        module=graph(encoder, unread),
        inputs=(
            TensorSpec(name="input_ids", dtype="int64", shape=("batch", length)),
            TensorSpec(name="clip_skip", dtype="int64", shape=(1,)),
            float_spec("extra_embeddings", "extra", config.hidden_size),
        ),
        outputs=tuple(outputs),
        tokens=dataclasses.replace(tokens, count=config.vocab_size),
        max_clip_skip=config.num_hidden_layers - unread,
    )


def unet_plans(unet: UNet) -> list[GraphPlan]:
    """Of one trace, which takes longest: with the deep feature as one more output, without, and as an input; with what
    ControlNets and T2I-Adapters add; and with that and image prompts.
    """
    config = unet.config
    given = _conditioned_inputs(config)
    if config.time_cond_proj_dim is not None:
        given = (*given, float_spec("timestep_cond", "rows", config.time_cond_proj_dim))
    noise_pred = float_spec("noise_pred", "rows", config.out_channels, "height", "width")
    feature = float_spec("deep_feature", "rows", config.block_out_channels[0], "height", "width")
    additions, prompts = unet_additions(config), image_prompt_specs(config)
    added = tuple(addition.spec for addition in additions)
    kinds = {
        "unet_deep": (UNetGraph(unet), given, (noise_pred, feature)),
        "unet": (UNetPart(unet, "forward"), given, (noise_pred,)),
        "unet_shallow": (UNetPart(unet, "shallow"), (*given, feature), (noise_pred,)),
        "unet_control": (UNetPart(unet, "controlled"), (*given, *added), (noise_pred,)),
    }
    if prompts:
        kinds[PROMPTED] = (UNetPart(unet, "prompted"), (*given, *added, *prompts), (noise_pred,))
    return [
        GraphPlan(
            network=network,
            component="unet",
            module=module,
            inputs=taken,
            outputs=made,
            whole=None if network == "unet_deep" else "unet_deep",
            additions=additions if network in ("unet_control", PROMPTED) else (),
            image_prompts=prompts if network == PROMPTED else (),
        )
        for network, (module, taken, made) in kinds.items()
    ]


def unet_additions(config: UNetConfig) -> tuple[Addition, ...]:
    """What T2I-Adapters and ControlNets add inside a UNet; a place's feature comes before its residual."""
    places, skips = feature_places(config), skip_connections(config)
    features = [
        Addition(spec=spec, place=place, onward=True)
        for spec, place in zip(feature_specs(config), [*places, len(skips)], strict=True)
    ]
    residuals = [Addition(spec=spec, place=place) for place, spec in enumerate(residual_specs(config))]
    return (*features, *residuals)


def controlnet_plan(controlnet: ControlNet) -> GraphPlan:
    """Of a ControlNet, whose outputs have the names of the inputs that they are for."""
    config, half = controlnet.config, controlnet.config.half
    made = residual_specs(half)
    if config.global_pool_conditions:
        made = tuple(dataclasses.replace(spec, shape=(*spec.shape[:2], 1, 1)) for spec in made)
    sample, timestep, context, *further = _conditioned_inputs(half)
    factor = config.downscale
    picture = (3, f"{factor}*height", f"{factor}*width")
    scale = float_spec("conditioning_scale", "rows", len(made))
    if isinstance(config, ControlNetUnionConfig):
        own = [
            float_spec("control_image", "rows", "pictures", *picture),
            scale,
            float_spec("control_mode", "rows", "pictures", config.num_control_type),
            float_spec("picture_scale", "rows", "pictures"),
        ]
    else:
        own = [float_spec("control_image", "rows", *picture), scale]
    return GraphPlan(
        network="controlnet_union" if isinstance(config, ControlNetUnionConfig) else "controlnet",
        component="controlnet",
        module=controlnet,
        inputs=(
            sample,
            timestep,
            context,
            *own,
            *further,
        ),
        outputs=made,
    )


def t2i_adapter_plan(adapter: T2IAdapter) -> GraphPlan:
    """Of a T2I-Adapter, whose outputs have the names of the inputs that they are for."""
    config = adapter.config
    factor = config.downscale
    picture = ("rows", config.in_channels, f"{factor}*height", f"{factor}*width")
    return GraphPlan(
        network="t2i_adapter",
        component="t2i_adapter",
        module=adapter,
        inputs=(float_spec("control_image", *picture),),
        outputs=tuple(_map_spec(f"adapter_feature_{index}", *place) for index, place in enumerate(config.features)),
    )


def ip_adapter_plans(encoder: ImageEncoder, adapter: IPAdapter) -> list[GraphPlan]:
    """Of an IP-Adapter: picture to embedding, embedding to tokens, tokens to keys and values of every layer."""
    config, pixels = adapter.config, encoder.config.image_size
    parts = () if config.kind == "plain" else (encoder.config.tokens,)
    embedding = float_spec("image_embedding", "batch", *parts, config.image_dim)
    tokens = float_spec("image_tokens", "batch", config.tokens, config.cross_attention_dim)
    made = tuple(
        float_spec(f"{name}_{index}", "batch", config.tokens, channels)
        for index, channels in enumerate(config.layers)
        for name in ("keys", "values")
    )
    own: tuple[tuple[str, str, nn.Module, TensorSpec, tuple[TensorSpec, ...]], ...] = (
        (
            "image_encoder", "image_encoder", encoder,
            float_spec("pixel_values", "batch", 3, pixels, pixels), (embedding,),
        ),
        ("image_projection", "ip_adapter", ImageProjectionGraph(adapter), embedding, (tokens,)),
        ("image_keys_values", "ip_adapter", ImageKeysValuesGraph(adapter), tokens, made),
    )  # fmt: skip
    return [
        GraphPlan(network=network, component=component, module=module, inputs=(taken,), outputs=outputs)
        for network, component, module, taken, outputs in own
    ]


def residual_specs(config: UNetConfig) -> tuple[TensorSpec, ...]:
    """What ControlNets add to each skip connection of a UNet, the outermost first, and behind its middle."""
    skips = skip_connections(config)
    made = [_map_spec(f"down_residual_{index}", *skip) for index, skip in enumerate(skips)]
    return (*made, _map_spec("mid_residual", *skips[-1]))


def feature_specs(config: UNetConfig) -> tuple[TensorSpec, ...]:
    """What T2I-Adapters add to what each block of a UNet that leads down hands on, and behind its middle."""
    skips = skip_connections(config)
    places = [*feature_places(config), len(skips) - 1]
    return tuple(_map_spec(f"adapter_feature_{index}", *skips[place]) for index, place in enumerate(places))


def _map_spec(name: str, channels: int, level: int) -> TensorSpec:
    """A feature map of a UNet's ``level``, where 0 has the size of the latents."""
    return float_spec(
        name, "rows", channels, *(f"{side}/{2**level}" if level else side for side in ("height", "width"))
    )


def image_prompt_specs(config: UNetConfig) -> tuple[TensorSpec, ...]:
    """Keys and values of image tokens for the cross-attentions of each block, and the bias of their scores; none where
    nothing attends to the prompt.
    """
    blocks, groups = cross_attentions(config), ("adapters", "image_tokens")
    if not blocks:
        return ()
    return (
        *(
            float_spec(f"{block}_image_{what}", "rows", count, *groups, channels)
            for block, count, channels in blocks
            for what in ("keys", "values")
        ),
        float_spec("image_bias", "rows", *groups),
    )


def _conditioned_inputs(config: UNetConfig) -> tuple[TensorSpec, ...]:
    """What a UNet or a ControlNet is given of latents, time, prompt and sizes."""
    inputs = [
        float_spec("sample", "rows", config.in_channels, "height", "width"),
        float_spec("timestep", "rows"),
        float_spec("encoder_hidden_states", "rows", "tokens", config.cross_attention_dim),
    ]
    if config.projection_class_embeddings_input_dim is not None and config.addition_time_embed_dim is not None:
        pooled = config.projection_class_embeddings_input_dim - SIZE_IDS * config.addition_time_embed_dim
        inputs += [float_spec("text_embeds", "rows", pooled), float_spec("time_ids", "rows", SIZE_IDS)]
    return tuple(inputs)


def language_model_plan(name: str, model: Qwen3, tokenizer: Tokenizer) -> GraphPlan:
    """Of the language model ``name``: a prompt in its frame, padded, and where the padding is."""
    length = tokenizer.max_length
    tokens = Tokens.read(tokenizer.vocab, tokenizer_spec(name, tokenizer))
    return GraphPlan(
        network=name,
        component=name,
        module=LanguageModelGraph(model),
        inputs=(
            TensorSpec(name="input_ids", dtype="int64", shape=("batch", length)),
            TensorSpec(name="attention_mask", dtype="int64", shape=("batch", length)),
        ),
        outputs=(float_spec("hidden_states", "batch", length, model.width),),
        tokens=tokens,
    )


def transformer_plans(transformer: Flux2Transformer) -> list[GraphPlan]:
    """Of a transformer, without reference pictures and with."""
    config = transformer.config
    given = (
        float_spec("sample", "rows", config.in_channels, "height", "width"),
        float_spec("timestep", "rows"),
        float_spec("encoder_hidden_states", "rows", "tokens", config.joint_attention_dim),
    )
    references = (
        float_spec("reference_latents", "rows", "references", config.in_channels),
        float_spec("reference_positions", "rows", "references", AXES),
    )
    return [
        GraphPlan(
            network=network,
            component="transformer",
            module=TransformerGraph(transformer),
            inputs=inputs,
            outputs=(float_spec("noise_pred", "rows", config.in_channels, "height", "width"),),
        )
        for network, inputs in (("transformer", given), ("transformer_edit", (*given, *references)))
    ]


def vae_plans(vae: Autoencoder | TinyAutoencoder) -> list[GraphPlan]:
    """Of decoder and encoder."""
    config = vae.config
    image = float_spec("image", "batch", config.out_channels, f"{config.downscale}*height", f"{config.downscale}*width")
    latents = ("batch", config.packed_channels, "height", "width")
    return [
        GraphPlan(
            network="vae_decoder",
            component="vae",
            module=VaeDecoderGraph(vae),
            inputs=(float_spec("latents", *latents),),
            outputs=(image,),
        ),
        GraphPlan(
            network="vae_encoder",
            component="vae",
            module=VaeEncoderGraph(vae),
            inputs=(image,),
            outputs=(float_spec("mean", *latents), float_spec("logvar", *latents)),
        ),
    ]


def vae_spec(vae: Autoencoder | TinyAutoencoder) -> VaeSpec:
    """The manifest's record of how latents relate to pixels."""
    config = vae.config
    return VaeSpec(
        scaling_factor=config.scaling_factor,
        shift_factor=config.shift_factor or 0.0,
        latent_channels=config.packed_channels,
        downscale=config.downscale,
    )


def chosen_layer(states: list[Tensor], unread: int, clip_skip: Tensor) -> Tensor:
    """The last of ``states`` but ``unread`` and ``clip_skip``, (B, T, D)."""
    states = states[: len(states) - unread]
    return torch.stack(states).index_select(0, len(states) - 1 - clip_skip)[0]


def float_spec(name: str, *shape: int | str) -> TensorSpec:
    """An input or output in float32."""
    return TensorSpec(name=name, dtype="float32", shape=shape)
