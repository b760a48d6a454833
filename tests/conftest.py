"""A tiny checkpoint, written by diffusers itself, and the bundle exported from it."""

from __future__ import annotations

import os
import signal
import warnings
import zipfile
from pathlib import Path

import pytest

from calotype.engine import cpu
from calotype.export.bundle import export_checkpoint
from calotype.runtime.onnx_runtime import TELEMETRY_OFF
from tests.kept import Kept
from tests.klein import write_klein
from training.config import CONTEXT_LENGTH
from training.tokenizer import END, START, write

VOCABULARY_SIZE = 520

# Tests import ONNX Runtime themselves, and so would leave things in the user's cache folder.
os.environ.setdefault(TELEMETRY_OFF, "1")
# Started in the background, a shell has interrupts ignored, and processes that tests start and interrupt inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    """Workers, which inherit this, compute with their share of the cores, as do the processes that tests start.

    Of more threads than cores, most of the time goes by in waiting for each other.
    """
    workers = config.getoption("numprocesses", None)
    if workers:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // workers)))


@pytest.fixture(autouse=True)
def no_plans(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the user has built is not what is tested."""
    monkeypatch.setenv("CALOTYPE_CACHE", str(tmp_path_factory.getbasetemp() / "no plans"))


@pytest.fixture
def builds_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines in int8 are built wherever a test runs; where bytes add up in 16 bits, their pictures alone are wrong."""
    if not cpu.multiplies_bytes():
        monkeypatch.setattr(cpu, "multiplies_bytes", lambda: True)
        monkeypatch.setattr(cpu, "MAX_ROOT_MEAN_SQUARE", float("inf"))


@pytest.fixture(scope="session")
def kept(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kept:
    """What takes long to make, kept until the export or these fixtures change."""
    fixtures = (Path(__file__), Path(__file__).parent / "runtime" / "conftest.py")
    return Kept(request.config.cache.mkdir("kept"), tmp_path_factory.mktemp("kept"), fixtures)


@pytest.fixture(scope="session")
def tiny_checkpoint(kept: Kept, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of every component of a Stable Diffusion 1.x model, a few thousand parameters each."""
    vocabulary = tmp_path_factory.mktemp("tokenizer")
    return kept("checkpoint", lambda folder: write_tiny(folder / "tiny", vocabulary)) / "tiny"


@pytest.fixture(scope="session")
def tiny_bundle(kept: Kept, tiny_checkpoint: Path) -> Path:
    """The checkpoint exported with fp16 weights."""

    def make(folder: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            export_checkpoint(tiny_checkpoint, folder / "tiny")

    return kept("bundle", make) / "tiny"


def write_tiny(folder: Path, vocabulary: Path) -> None:
    """The tiny checkpoint in ``folder``, its tokenizer's files in ``vocabulary`` too."""
    import torch
    from tokenizers.pre_tokenizers import ByteLevel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers
        import transformers

        letters = sorted(ByteLevel.alphabet())
        tokens = [*letters, *(letter + "</w>" for letter in letters)]
        merges = [("a", "p"), ("ap", "p"), ("l", "e</w>"), ("app", "le</w>"), ("r", "e"), ("re", "d</w>")]
        tokens += [left + right for left, right in merges] + [START, END]
        assert len(tokens) == VOCABULARY_SIZE
        write(vocabulary, {token: index for index, token in enumerate(tokens)}, merges)
        torch.manual_seed(0)
        text = transformers.CLIPTextConfig(
            vocab_size=VOCABULARY_SIZE,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT_LENGTH,
            bos_token_id=VOCABULARY_SIZE - 2,
            eos_token_id=VOCABULARY_SIZE - 1,
            pad_token_id=VOCABULARY_SIZE - 1,
        )
        pipeline = diffusers.StableDiffusionPipeline(
            vae=diffusers.AutoencoderKL(
                block_out_channels=(8, 16),
                down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("UpDecoderBlock2D",) * 2,
                layers_per_block=1,
                latent_channels=4,
                norm_num_groups=4,
                sample_size=32,
            ),
            unet=diffusers.UNet2DConditionModel(
                sample_size=16,
                block_out_channels=(32, 64),
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
                layers_per_block=1,
                attention_head_dim=4,
                cross_attention_dim=32,
            ),
            text_encoder=transformers.CLIPTextModel(text),
            tokenizer=transformers.CLIPTokenizer.from_pretrained(vocabulary),
            scheduler=diffusers.DDIMScheduler(
                beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.save_pretrained(folder)
        # transformers 5 writes one tokenizer.json; the checkpoints people have hold these two files.
        for name in ("vocab.json", "merges.txt"):
            (folder / "tokenizer" / name).write_bytes((vocabulary / name).read_bytes())


@pytest.fixture(scope="session")
def klein_checkpoint(kept: Kept) -> Path:
    """Random weights of every component of a FLUX.2 klein model, distilled, the transformer's in shards."""
    return kept("klein_checkpoint", lambda folder: write_klein(folder / "klein", shard="150KB")) / "klein"


@pytest.fixture(scope="session")
def klein_bundle(kept: Kept, klein_checkpoint: Path) -> Path:
    """That checkpoint, of weights in float16, exported in float32: the two are equal, and it takes half the time."""

    def make(folder: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            export_checkpoint(klein_checkpoint, folder / "klein", precision="fp32")

    return kept("klein", make) / "klein"


@pytest.fixture(scope="session")
def taesd_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny autoencoder alone, random weights, written by diffusers: what exports quickest. Not to be changed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers
        import torch

        torch.manual_seed(3)
        vae = diffusers.AutoencoderTiny(
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        )
        folder = tmp_path_factory.mktemp("checkpoint") / "taesd"
        vae.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def format1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of format 1, as Calotype 0.1 wrote it: the tiny checkpoint's in float32, its weights in few bits."""
    folder = tmp_path_factory.mktemp("bundles") / "format1"
    with zipfile.ZipFile(Path(__file__).parent / "data" / "format1.zip") as file:
        file.extractall(folder)
    return folder
