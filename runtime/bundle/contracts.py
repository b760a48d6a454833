"""What the runtime gives to the networks that it knows by name, and takes from them."""

from __future__ import annotations

from collections.abc import Mapping

from calotype.runtime.bundle.spec import ModelSpec, TensorSpec
from calotype.runtime.errors import BundleError

# A shape; None stands for any number.
Shape = tuple[int | str | None, ...]
Tensors = Mapping[str, Shape]

TEXT_ENCODER: tuple[Tensors, Tensors] = (
    {"input_ids": ("batch", None), "clip_skip": (1,), "extra_embeddings": ("extra", None)},
    {"hidden_states": ("batch", None, None)},
)
# The same of a language model, which is told where a prompt's padding is.
LANGUAGE_MODEL: tuple[Tensors, Tensors] = (
    {"input_ids": ("batch", None), "attention_mask": ("batch", None)},
    {"hidden_states": ("batch", None, None)},
)
SAMPLE: Shape = ("rows", None, "height", "width")
SAMPLED: Tensors = {"sample": SAMPLE, "timestep": ("rows",), "encoder_hidden_states": ("rows", "tokens", None)}
LATENTS: Shape = ("batch", None, "height", "width")
TOKENS: Shape = ("batch", None, None)
IMAGE: Shape = ("batch", 3, "f*height", "f*width")
# Network -> inputs, outputs. More of both is allowed, and so are other networks.
CONTRACTS: Mapping[str, tuple[Tensors, Tensors]] = {
    "text_encoder": TEXT_ENCODER,
    "text_encoder_2": TEXT_ENCODER,
    "unet": (SAMPLED, {"noise_pred": SAMPLE}),
    "unet_deep": (SAMPLED, {"noise_pred": SAMPLE, "deep_feature": SAMPLE}),
    "unet_control": ({**SAMPLED, "down_residual_0": SAMPLE}, {"noise_pred": SAMPLE}),
    "unet_image_prompt": (
        {**SAMPLED, "down_residual_0": SAMPLE, "image_bias": ("rows", "adapters", "image_tokens")},
        {"noise_pred": SAMPLE},
    ),
    "image_encoder": ({"pixel_values": ("batch", 3, None, None)}, {}),
    "image_projection": ({}, {"image_tokens": TOKENS}),
    "image_keys_values": ({"image_tokens": TOKENS}, {"keys_0": TOKENS, "values_0": TOKENS}),
    # What it gives has to be what a UNet takes, which is not known here.
    "controlnet": (
        {**SAMPLED, "control_image": ("rows", 3, "f*height", "f*width"), "conditioning_scale": ("rows", None)},
        {},
    ),
    # What it reads of a prompt is its family's.
    "transformer": ({"sample": SAMPLE, "timestep": ("rows",)}, {"noise_pred": SAMPLE}),
    "transformer_edit": (
        {
            **SAMPLED,
            "reference_latents": ("rows", "references", None),
            "reference_positions": ("rows", "references", None),
        },
        {"noise_pred": SAMPLE},
    ),
    "controlnet_union": (
        {
            **SAMPLED,
            "control_image": ("rows", "pictures", 3, "f*height", "f*width"),
            "conditioning_scale": ("rows", None),
            "control_mode": ("rows", "pictures", None),
            "picture_scale": ("rows", "pictures"),
        },
        {},
    ),
    "t2i_adapter": (
        {"control_image": ("rows", None, "f*height", "f*width")},
        {},
    ),
    "unet_shallow": ({**SAMPLED, "deep_feature": SAMPLE}, {"noise_pred": SAMPLE}),
    "vae_decoder": ({"latents": LATENTS}, {"image": IMAGE}),
    "safety_checker": (
        {"pixel_values": ("batch", 3, None, None)},
        {"special_care": ("batch", None), "concepts": ("batch", None)},
    ),
    "vae_encoder": ({"image": IMAGE}, {"mean": LATENTS, "logvar": LATENTS}),
}


def check_contract(network: str, spec: ModelSpec, downscale: int) -> None:
    """Compare a network with what is said of one of its name; a latent is ``downscale`` pixels wide.

    Raises:
        BundleError: an input or output is missing, or of another shape.
    """
    reads_padding = network == "text_encoder" and spec.input("attention_mask") is not None
    contract = LANGUAGE_MODEL if reads_padding else CONTRACTS.get(network, ({}, {}))
    for way, wanted in zip(("inputs", "outputs"), contract, strict=True):
        found: dict[str, TensorSpec] = {tensor.name: tensor for tensor in getattr(spec, way)}
        for name, shape in wanted.items():
            tensor = found.get(name)
            if tensor is None or not _fits(tensor.shape, shape, downscale):
                have = "has none" if tensor is None else f"is {_text(tensor.shape)}"
                what = f"the manifest's {network} {way[:-1]} {name}"
                raise BundleError(f"{what} {have}; needed: {_text(shape)}; export the bundle again")


def _fits(shape: Shape, wanted: Shape, downscale: int) -> bool:
    if len(shape) != len(wanted):
        return False
    pairs = zip(shape, wanted, strict=True)
    return all(isinstance(own, int) if other is None else own in _named(other, downscale) for own, other in pairs)


def _named(dimension: int | str, downscale: int) -> tuple[int | str, ...]:
    """How ``f*height`` can be written where f is ``downscale``."""
    if isinstance(dimension, int) or not dimension.startswith("f*"):
        return (dimension,)
    symbol = dimension.removeprefix("f*")
    return (f"{downscale}*{symbol}", *([symbol] if downscale == 1 else []))


def _text(shape: Shape) -> str:
    return "(" + ", ".join("n" if size is None else str(size)[:40] for size in shape[:8]) + ")"
