"""What an export takes: ``python -m benchmarks.export [sd1|sdxl]``. Seconds, memory and bytes, as JSON.

A checkpoint of the real size is made on the spot in diffusers' layout, random weights in float16, and exported by the
command line in a process of its own, whose largest resident size the kernel counts (mapped files are part of it).
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import onnxscript
import torch
from safetensors.torch import save_file
from torch import nn

from calotype.export.models.autoencoder import Autoencoder, AutoencoderConfig
from calotype.export.models.clip import TextEncoder, TextEncoderConfig
from calotype.export.models.config import ModelConfig
from calotype.export.models.unet import UNet, UNetConfig
from calotype.export.tokenizer import Tokenizer
from calotype.runtime.manifest import Manifest

SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
}
CLIP_L = TextEncoderConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
BIG_G = TextEncoderConfig(
    hidden_size=1280,
    intermediate_size=5120,
    num_hidden_layers=32,
    num_attention_heads=20,
    hidden_act="gelu",
    projection_dim=1280,
)
SDXL_UNET = UNetConfig(
    block_out_channels=(320, 640, 1280),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    transformer_layers_per_block=(1, 2, 10),
    attention_head_dim=(5, 10, 20),
    cross_attention_dim=2048,
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)
SIZES: dict[str, dict[str, tuple[type[nn.Module], ModelConfig]]] = {
    "sd1": {
        "text_encoder": (TextEncoder, CLIP_L),
        "unet": (UNet, UNetConfig(cross_attention_dim=768)),
        "vae": (Autoencoder, AutoencoderConfig()),
    },
    "sdxl": {
        "text_encoder": (TextEncoder, CLIP_L),
        "text_encoder_2": (TextEncoder, dataclasses.replace(BIG_G, with_projection=True)),
        "unet": (UNet, SDXL_UNET),
        "vae": (Autoencoder, AutoencoderConfig(scaling_factor=0.13025)),
    },
}
PIPELINES = {"sd1": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}


def main() -> None:
    """Make, export, print."""
    family = sys.argv[1] if len(sys.argv) > 1 else "sd1"
    with tempfile.TemporaryDirectory() as folder:
        source, bundle = Path(folder) / "checkpoint", Path(folder) / "bundle"
        # In a process of its own, so that its memory is not counted as the export's.
        subprocess.run(
            [sys.executable, "-c", f"import benchmarks.export as e; e.make({family!r}, {str(source)!r})"], check=True
        )
        made = resource.getrusage(resource.RUSAGE_CHILDREN)
        load, start = os.getloadavg()[0], time.perf_counter()
        subprocess.run([sys.executable, "-m", "calotype.runtime", "export", str(source), str(bundle)], check=True)
        seconds = time.perf_counter() - start
        spent = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert spent.ru_maxrss > made.ru_maxrss, "making the checkpoint took more memory than its export"
        report = {
            "command": f"python -m benchmarks.export {family}",
            "commit": subprocess.run(
                ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
            ).stdout.strip(),
            "machine": {
                "processor": f"{platform.machine()}, {os.cpu_count()} cores",
                "load_before_and_after": [round(load, 1), round(os.getloadavg()[0], 1)],
                "python": platform.python_version(),
                **{module.__name__: module.__version__ for module in (torch, onnx, onnxruntime, onnxscript)},
            },
            "seconds": round(seconds),
            "cpu_seconds": round(spent.ru_utime + spent.ru_stime - made.ru_utime - made.ru_stime),
            "peak_resident_gb": round(spent.ru_maxrss * 1024 / 1e9, 1),
            **_sizes(bundle),
        }
    print(json.dumps(report, indent=2))


def make(family: str, source: str) -> None:
    """Write a checkpoint of ``family`` with random weights to the folder ``source``."""
    folder = Path(source)
    torch.manual_seed(0)
    for name, (build, config) in SIZES[family].items():
        torch.set_default_dtype(torch.float16)
        module = build(config)
        torch.set_default_dtype(torch.float32)
        (folder / name).mkdir(parents=True)
        stem = "model" if name.startswith("text_encoder") else "diffusion_pytorch_model"
        save_file(module.state_dict(), folder / name / f"{stem}.safetensors")
        _write_config(folder / name, module, config)
    for name in ("tokenizer", "tokenizer_2")[: 2 if family == "sdxl" else 1]:
        tokenizer = Tokenizer.clip("!" if name == "tokenizer_2" else "<|endoftext|>")
        (folder / name).mkdir()
        (folder / name / "vocab.json").write_bytes(tokenizer.vocab)
        (folder / name / "merges.txt").write_bytes(tokenizer.merges)
        _write(folder / name / "tokenizer_config.json", {"pad_token": tokenizer.pad_token})
    (folder / "scheduler").mkdir()
    _write(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    _write(folder / "model_index.json", {"_class_name": PIPELINES[family]})


def _write_config(folder: Path, module: nn.Module, config: ModelConfig) -> None:
    values = config.to_json()
    if values.pop("with_projection", False):
        values["architectures"] = ["CLIPTextModelWithProjection"]
    if isinstance(module, UNet):
        values["sample_size"] = 64
    _write(folder / "config.json", values)


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value))


def _sizes(bundle: Path) -> dict[str, Any]:
    manifest = Manifest.read(bundle)
    return {
        "graphs_mb": {
            name: round(file.size / 1e6, 2) for name, file in manifest.files.items() if name.endswith("onnx")
        },
        "weights_mb": {
            name: round(file.size / 1e6, 1) for name, file in manifest.files.items() if name.endswith("safetensors")
        },
        "parity": {
            network: {
                precision: {key: len(value) if isinstance(value, dict) else value for key, value in figures.items()}
                for precision, figures in report.items()
            }
            for network, report in manifest.parity.items()
        },
    }


if __name__ == "__main__":
    main()
