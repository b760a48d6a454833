"""What is compared: every peer and every way to run it, and the environment each lives in."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Converter:
    """A program of an environment that is called with a checkpoint and a folder to make, in place of the braces."""

    environment: str
    command: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peer:
    """One way to turn the same prompt into the same picture.

    Attributes:
        module: in this folder, the program that serves it.
        environment: in ``requirements``, what it is installed with.
        mode: told to the module.
        exact: computes in float32 throughout; others are compared with that in mind.
        converter: makes its own form of the checkpoint; None takes the checkpoint.
        models: those it can load, by name.
        title: as people know it.
    """

    module: str
    environment: str
    title: str
    mode: str = ""
    exact: bool = True
    converter: Converter | None = None
    models: tuple[str, ...] = ("talbot", "sd1")


TO_ONNX = Converter(
    environment="optimum-onnx",
    command=("optimum-cli", "export", "onnx", "--model", "{checkpoint}", "--task", "text-to-image", "{folder}"),
)
# The weights are float16 in the checkpoint, and float16 keeps them; what it computes in is said when it is opened.
TO_OPENVINO = Converter(
    environment="optimum-intel",
    command=(
        *("optimum-cli", "export", "openvino", "--model", "{checkpoint}", "--task", "text-to-image"),
        *("--weight-format", "fp16", "{folder}"),
    ),
)
CALOTYPE = "calotype"
PEERS = {
    # With engines that "calotype build" made, as the others' models are converted beforehand.
    CALOTYPE: Peer(module="calotype_peer", environment="calotype", mode="built", title="Calotype"),
    "calotype-unbuilt": Peer(module="calotype_peer", environment="calotype", title="Calotype, nothing built"),
    "calotype-int8": Peer(
        module="calotype_peer", environment="calotype", mode="int8", exact=False, title="Calotype, UNet in int8"
    ),
    "calotype-fast": Peer(
        module="calotype_peer",
        environment="calotype",
        mode="fast",
        exact=False,
        title="Calotype, --fast: 60% of the steps, UNet in int8",
    ),
    "diffusers": Peer(
        module="diffusers_peer", environment="diffusers", mode="eager", title="diffusers, PyTorch as it comes"
    ),
    "diffusers-channels-last": Peer(
        module="diffusers_peer", environment="diffusers", mode="channels-last", title="diffusers, channels last"
    ),
    "diffusers-compile": Peer(
        module="diffusers_peer", environment="diffusers", mode="compile", title="diffusers, torch.compile"
    ),
    "diffusers-bf16": Peer(
        module="diffusers_peer",
        environment="diffusers",
        mode="bf16",
        exact=False,
        title="diffusers, channels last, bfloat16",
    ),
    "optimum-onnx": Peer(
        module="optimum_peer", environment="optimum-onnx", converter=TO_ONNX, title="optimum-onnx (ONNX Runtime)"
    ),
    "openvino": Peer(
        module="openvino_peer", environment="openvino", converter=TO_OPENVINO, mode="f32", title="OpenVINO GenAI"
    ),
    "openvino-default": Peer(
        module="openvino_peer",
        environment="openvino",
        converter=TO_OPENVINO,
        mode="",
        exact=False,
        title="OpenVINO GenAI, precision left to it",
    ),
    "stable-diffusion.cpp": Peer(
        module="stable_diffusion_cpp_peer",
        environment="stable-diffusion-cpp",
        mode="f32",
        models=("sd1",),
        title="stable-diffusion.cpp, float32",
    ),
    "stable-diffusion.cpp-f16": Peer(
        module="stable_diffusion_cpp_peer",
        environment="stable-diffusion-cpp",
        mode="f16",
        exact=False,
        models=("sd1",),
        title="stable-diffusion.cpp, float16 weights",
    ),
}
