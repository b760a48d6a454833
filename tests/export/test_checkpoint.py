"""Checkpoints in diffusers' layout."""

from __future__ import annotations

import gzip
import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from calotype.export.models.autoencoder import Autoencoder
from calotype.export.models.tiny_autoencoder import TinyAutoencoder
from calotype.export.sources import load_checkpoint
from calotype.export.tokenizer import Tokenizer
from calotype.export.weight_files import read_component, variants
from calotype.runtime.bundle.manifest import TokenizerSpec
from calotype.runtime.errors import CheckpointError, InputError, UnsupportedArchitectureError
from calotype.runtime.text.tokenizer import ClipTokenizer
from tests.export.conftest import SCHEDULER, write_folder, write_json

Maker = Callable[[str], Path]
WEIGHTS = "diffusion_pytorch_model"
RECORDED = Path(__file__).parent.parent / "data" / "clip" / "openai.jsonl.gz"


def edit(path: Path, **values: Any) -> None:
    write_json(path, json.loads(path.read_text()) | values)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_the_family_and_what_comes_with_it(family: str, folder: Maker) -> None:
    checkpoint = load_checkpoint(folder(family))
    assert (checkpoint.family, checkpoint.sample_size) == (family, 8)
    assert checkpoint.source == {"layout": "diffusers", "name": f"small-{family}"}
    second = {"text_encoder_2": "tokenizer_2"} if family == "sdxl" else {}
    assert list(checkpoint.components) == ["text_encoder", *second, "unet", "vae"]
    assert list(checkpoint.tokenizers) == ["tokenizer", *second.values()]
    assert checkpoint.force_zeros_for_empty_prompt == (family == "sdxl")
    assert checkpoint.scheduler == SCHEDULER
    for name in ("text_encoder", *second):
        tower: Any = checkpoint.components[name]
        assert not tower.training and tower.text_model.embeddings.token_embedding.weight.is_leaf


def test_the_prediction_type_can_be_overridden(folder: Maker) -> None:
    checkpoint = load_checkpoint(folder("sd1"), prediction_type="v_prediction")
    assert checkpoint.scheduler == SCHEDULER | {"prediction_type": "v_prediction"}


@pytest.mark.parametrize(
    ("changes", "pipeline"),
    [
        ({"in_channels": 9}, "StableDiffusionInpaintPipeline"),
        ({"time_cond_proj_dim": 6}, "LatentConsistencyModelPipeline"),
    ],
)
def test_inpainting_and_consistency_models(tmp_path: Path, changes: dict[str, int], pipeline: str) -> None:
    write_folder(tmp_path, "sd1", **changes)
    edit(tmp_path / "model_index.json", _class_name=pipeline)
    unet: Any = load_checkpoint(tmp_path).components["unet"]
    ((name, value),) = changes.items()
    assert getattr(unet.config, name) == value


@pytest.mark.parametrize("tiny", [True, False])
def test_an_autoencoder_alone(folder: Maker, tmp_path: Path, tiny: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers

        source = tmp_path / "taesd" if tiny else folder("sd1") / "vae"
        if tiny:
            diffusers.AutoencoderTiny(num_encoder_blocks=(1,) * 4, num_decoder_blocks=(1,) * 4).save_pretrained(source)
    checkpoint = load_checkpoint(source)
    assert isinstance(checkpoint.components["vae"], TinyAutoencoder if tiny else Autoencoder)
    assert (checkpoint.family, checkpoint.source["name"]) == ("vae", source.name)
    assert (list(checkpoint.components), checkpoint.tokenizers, checkpoint.scheduler) == (["vae"], {}, {})


def test_a_checkpoint_with_a_tiny_autoencoder(copied: Maker) -> None:
    source = copied("sd1")
    shutil.rmtree(source / "vae")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers

        diffusers.AutoencoderTiny(num_encoder_blocks=(1,) * 4, num_decoder_blocks=(1,) * 4).save_pretrained(
            source / "vae"
        )
    assert isinstance(load_checkpoint(source).components["vae"], TinyAutoencoder)


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("shard_size", ["10GB", "200KB"])
def test_variants_and_shards_as_diffusers_writes_them(
    folder: Maker, copied: Maker, variant: str | None, shard_size: str
) -> None:
    source = copied("sd1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers
        import transformers

        unet = diffusers.UNet2DConditionModel.from_pretrained(source / "unet")
        tower = transformers.CLIPTextModel.from_pretrained(source / "text_encoder")
        for name, model in (("unet", unet), ("text_encoder", tower)):
            for path in (source / name).glob("*.safetensors*"):
                path.unlink()
            model.save_pretrained(source / name, variant=variant, max_shard_size=shard_size)
    sharded = len(list((source / "unet").glob("*.safetensors"))) > 1
    assert sharded == (shard_size == "200KB")
    one, other = load_checkpoint(folder("sd1")), load_checkpoint(source)
    for component, mine in one.components.items():
        state = other.components[component].state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in mine.state_dict().items())


def test_whole_precision_is_taken_where_both_variants_are(copied: Maker) -> None:
    source = copied("sd1") / "unet"
    state = load_file(source / f"{WEIGHTS}.safetensors")
    save_file({name: tensor.half() for name, tensor in state.items()}, source / f"{WEIGHTS}.fp16.safetensors")
    unet: Any = load_checkpoint(source.parent).components["unet"]
    assert torch.equal(unet.conv_in.weight, state["conv_in.weight"])
    (source / f"{WEIGHTS}.safetensors").unlink()
    unet = load_checkpoint(source.parent).components["unet"]
    assert torch.equal(unet.conv_in.weight, state["conv_in.weight"].half())


def test_what_transformers_4_wrote_into_every_configuration_is_passed_over(copied: Maker) -> None:
    source = copied("sd1")
    edit(source / "text_encoder" / "config.json", temperature=1.0, pruned_heads={}, use_bfloat16=False, top_k=50)
    assert load_checkpoint(source).family == "sd1"


def test_a_component_without_weights_says_what_is_there(copied: Maker) -> None:
    source = copied("sd1")
    (source / "unet" / f"{WEIGHTS}.safetensors").unlink()
    with pytest.raises(CheckpointError, match=rf"unet has no {WEIGHTS}\.safetensors; it has config\.json: fetch"):
        load_checkpoint(source)


@pytest.mark.parametrize("variant", ["bf16", "non_ema"])
@pytest.mark.parametrize("shard_size", ["10GB", "200KB"])
def test_the_only_variant_of_a_component_is_taken(
    folder: Maker, copied: Maker, caplog: pytest.LogCaptureFixture, variant: str, shard_size: str
) -> None:
    source = copied("sd1")
    (source / "unet" / f"{WEIGHTS}.safetensors").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers

        unet = diffusers.UNet2DConditionModel.from_pretrained(folder("sd1") / "unet")
        unet.save_pretrained(source / "unet", variant=variant, max_shard_size=shard_size)
    with caplog.at_level(logging.WARNING, "calotype"):
        state = load_checkpoint(source).components["unet"].state_dict()
    assert f"unet has no {WEIGHTS}.safetensors; its only variant, {variant}, is taken" in caplog.text
    expected = load_checkpoint(folder("sd1")).components["unet"].state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in expected.items())


@pytest.mark.parametrize("variant", ["fp16", "bf16"])
@pytest.mark.parametrize(
    ("stem", "name"), [(WEIGHTS, f"{WEIGHTS}.{{}}.bin"), ("model", "pytorch_model.{}.bin"), ("model", "model.{}.bin")]
)
def test_a_variant_that_is_pickled_is_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, variant: str, stem: str, name: str
) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / name.format(variant))
    assert variants(tmp_path, stem) == [variant]
    with caplog.at_level(logging.WARNING, "calotype"):
        assert list(read_component(tmp_path, stem)) == list(read_component(tmp_path, stem, variant)) == ["a"]
    said = f"has no {stem}.safetensors; its only variant, {variant}, is taken"
    assert (said in caplog.text) == (variant != "fp16")
    torch.save({"b": torch.ones(1)}, tmp_path / f"{stem}.bin")
    assert list(read_component(tmp_path, stem)) == ["b"]
    assert list(read_component(tmp_path, stem, variant)) == ["a"]
    (tmp_path / f"{stem}.bin").unlink()
    torch.save({"c": torch.ones(1)}, tmp_path / f"{stem}.part.bin")
    if variant != "fp16":
        with pytest.raises(CheckpointError, match=r"but the variants bf16, part; choose one with --variant"):
            read_component(tmp_path, stem)


def test_a_variant_that_is_pickled_in_parts_is_taken(tmp_path: Path) -> None:
    shard = f"{WEIGHTS}.bf16-00001-of-00001.bin"
    torch.save({"a": torch.ones(1)}, tmp_path / shard)
    write_json(tmp_path / f"{WEIGHTS}.bin.index.bf16.json", {"weight_map": {"a": shard}})
    assert variants(tmp_path, WEIGHTS) == ["bf16"]
    assert list(read_component(tmp_path, WEIGHTS)) == ["a"]


@pytest.mark.parametrize(
    "index", ["safetensors.index.{}.json", "safetensors.{}.index.json", "{}.safetensors.index.json"]
)
def test_every_place_of_a_variant_in_an_index_s_name(tmp_path: Path, index: str) -> None:
    shard = f"{WEIGHTS}.bf16-00001-of-00001.safetensors"
    save_file({"a": torch.ones(1)}, tmp_path / shard)
    write_json(tmp_path / f"{WEIGHTS}.{index.format('bf16')}", {"weight_map": {"a": shard}})
    assert variants(tmp_path, WEIGHTS) == ["bf16"]
    assert list(read_component(tmp_path, WEIGHTS)) == list(read_component(tmp_path, WEIGHTS, "bf16")) == ["a"]


def test_one_of_several_variants_is_chosen(copied: Maker) -> None:
    source = copied("sd1")
    path = source / "unet" / f"{WEIGHTS}.safetensors"
    state = load_file(path)
    for number, variant in enumerate(("bf16", "non_ema")):
        save_file(
            {name: tensor + number for name, tensor in state.items()}, path.with_suffix(f".{variant}.safetensors")
        )
    checkpoint = load_checkpoint(source, variant="non_ema")
    unet: Any = checkpoint.components["unet"]
    assert torch.equal(unet.conv_in.weight, state["conv_in.weight"] + 1)
    assert checkpoint.source["variant"] == "non_ema"
    path.unlink()
    with pytest.raises(CheckpointError, match=r"but the variants bf16, non_ema; choose one with --variant"):
        load_checkpoint(source)
    unet = load_checkpoint(source, variant="bf16").components["unet"]
    assert torch.equal(unet.conv_in.weight, state["conv_in.weight"])
    with pytest.raises(InputError, match="no weights of the variant 'fp8'; it has bf16, non_ema"):
        load_checkpoint(source, variant="fp8")


def test_a_file_has_no_variants(single_file: Maker) -> None:
    with pytest.raises(InputError, match="is one file, which has no variants; export without --variant"):
        load_checkpoint(single_file("sd1"), variant="fp16")


def test_a_missing_shard_is_named(copied: Maker) -> None:
    source = copied("sd1") / "unet"
    (source / f"{WEIGHTS}.safetensors.index.json").write_text('{"weight_map": {"conv_in.bias": "gone.safetensors"}}')
    with pytest.raises(CheckpointError, match=r"gone\.safetensors is missing; download it$"):
        load_checkpoint(source.parent)


def test_the_attention_of_old_autoencoders(folder: Maker, copied: Maker) -> None:
    """Before diffusers 0.14 it was named otherwise, and some files hold it as convolutions."""
    source = copied("sd1")
    path = source / "vae" / f"{WEIGHTS}.safetensors"
    names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    state = {}
    for name, tensor in load_file(path).items():
        for new, old in names.items():
            name = name.replace(new, old)
        state[name] = tensor[..., None, None] if ".query.weight" in name else tensor
    save_file(state, path)
    theirs = load_checkpoint(source).components["vae"].state_dict()
    ours = load_checkpoint(folder("sd1")).components["vae"].state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_a_tokenizer_in_one_file(folder: Maker, tmp_path: Path) -> None:
    """Transformers 5 writes ``tokenizer.json`` alone; its merges are pairs or lines."""
    plain = Tokenizer.from_folder(folder("sd2") / "tokenizer")
    vocab, lines = json.loads(plain.vocab), plain.merges.decode().splitlines()
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(folder("sd2") / "tokenizer" / name, tmp_path)
    for merges in (lines[1:], [line.split(" ") for line in lines[1:]]):
        write_json(tmp_path / "tokenizer.json", {"model": {"type": "BPE", "vocab": vocab, "merges": merges}})
        tokenizer = Tokenizer.from_folder(tmp_path)
        assert (json.loads(tokenizer.vocab), tokenizer.merges.decode().splitlines()) == (vocab, lines)
        assert tokenizer.pad_token == plain.pad_token == "!"
    write_json(tmp_path / "tokenizer.json", {"model": {"type": "Unigram"}})
    with pytest.raises(CheckpointError, match="is not a byte-pair tokenizer"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no vocab\.json"):
        Tokenizer.from_folder(tmp_path)


def test_a_token_that_is_null_is_the_usual_one(folder: Maker, tmp_path: Path) -> None:
    shutil.copytree(folder("sd1") / "tokenizer", tmp_path, dirs_exist_ok=True)
    edit(tmp_path / "special_tokens_map.json", pad_token=None, bos_token={"content": "<|startoftext|>"}, eos_token=None)
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|startoftext|>", "<|endoftext|>")
    assert tokenizer.pad_token == "<|endoftext|>"


def test_clips_own_tokenizer_is_the_recorded_one(tmp_path: Path) -> None:
    """The ids are OpenAI's, recorded by ``tests/data/clip/record.py``; phrases that it leaves as they are."""
    tokenizer = Tokenizer.clip("!")
    (tmp_path / "vocab.json").write_bytes(tokenizer.vocab)
    (tmp_path / "merges.txt").write_bytes(tokenizer.merges)
    spec = TokenizerSpec(vocab="vocab.json", merges="merges.txt", pad_token="!")
    clip = ClipTokenizer.from_files(tmp_path / "vocab.json", tmp_path / "merges.txt", spec)
    assert (clip.bos_id, clip.eos_id, clip.pad_id) == (49406, 49407, 0)
    records = [json.loads(line) for line in gzip.decompress(RECORDED.read_bytes()).splitlines()]
    phrases = [record for record in records if record["category"].startswith("labels") and "cleaned" not in record]
    assert len(phrases) > 3000
    assert all(clip.tokenize(record["text"]) == record["ids"] for record in phrases)


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("model_index.json", {"_class_name": "FluxPipeline"}, "FluxPipeline.*supported: StableDiffusionPipeline"),
        (
            "unet/config.json",
            {"_class_name": "UNet3DConditionModel"},
            "UNet3DConditionModel.*supported: UNet2DCondition",
        ),
        ("unet/config.json", {"norm_num_groups": 7}, "norm_num_groups=7 does not divide the channels"),
        ("vae/config.json", {"latents_mean": [0.1] * 4}, r"latents_mean=\[0\.1, .* is not supported; supported: None"),
        ("vae/config.json", {"_class_name": "VQModel"}, "VQModel.*supported: AutoencoderKL, AutoencoderTiny"),
        ("text_encoder/config.json", {"architectures": ["T5EncoderModel"]}, "T5EncoderModel.*supported: CLIPTextModel"),
        ("text_encoder/config.json", {"hidden_act": "relu"}, "hidden_act='relu'"),
    ],
)
def test_another_architecture_is_refused_by_name(
    copied: Maker, file: str, values: dict[str, Any], message: str
) -> None:
    source = copied("sd1")
    edit(source / file, **values)
    with pytest.raises(UnsupportedArchitectureError, match=message):
        load_checkpoint(source)


def test_the_refiner_is_refused_by_name(copied: Maker) -> None:
    source = copied("sdxl")
    shutil.rmtree(source / "text_encoder")
    with pytest.raises(UnsupportedArchitectureError, match="the SDXL refiner, which is not supported; use the base"):
        load_checkpoint(source)


def test_components_of_different_models(copied: Maker, tmp_path: Path) -> None:
    source = copied("sdxl")
    edit(source / "model_index.json", _class_name="StableDiffusionPipeline")
    with pytest.raises(CheckpointError, match=r"of width 192, the text encoders give 64; .* of different models"):
        load_checkpoint(source)
    write_folder(tmp_path / "eight", "sd1", in_channels=8)
    with pytest.raises(UnsupportedArchitectureError, match=r"reads 8 channels .* supported: 4, and 9 for inpainting"):
        load_checkpoint(tmp_path / "eight")


def test_files_that_are_not_there_or_not_json(copied: Maker) -> None:
    source = copied("sd1")
    (source / "scheduler" / "scheduler_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="is not a JSON object"):
        load_checkpoint(source)
    (source / "scheduler" / "scheduler_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(source)
    (source / "model_index.json").unlink()
    with pytest.raises(CheckpointError, match=r"model_index\.json does not exist; a checkpoint folder"):
        load_checkpoint(source)


HOSTILE = {"deep": b"[" * 100_000, "deep table": b'{"a":' * 100_000, "digits": b'{"a": ' + b"1" * 5000 + b"}"}


@pytest.mark.parametrize("data", [*HOSTILE.values(), None], ids=[*HOSTILE, "pipe"])
@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json", "tokenizer/tokenizer_config.json"])
def test_hostile_json_is_one_line(copied: Maker, name: str, data: bytes | None) -> None:
    path = copied("sd1") / name
    path.unlink(missing_ok=True)
    if data is None:
        os.mkfifo(path)
    else:
        path.write_bytes(data)
    with pytest.raises(CheckpointError, match="cannot be read") as caught:
        load_checkpoint(path.parents[name.count("/")])
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000


@pytest.mark.parametrize(("said", "length"), [(64, 64), (200, 77), (int(1e30), 77), (None, 77)])
def test_prompts_are_as_long_as_tokenizer_and_encoder_take_them(
    copied: Maker, caplog: pytest.LogCaptureFixture, said: int | None, length: int
) -> None:
    """Diffusers cuts and pads to ``model_max_length``, and the encoder has no more positions than its own."""
    source = copied("sd1")
    edit(source / "tokenizer" / "tokenizer_config.json", model_max_length=said)
    with caplog.at_level(logging.WARNING, "calotype"):
        checkpoint = load_checkpoint(source)
    assert checkpoint.tokenizers["tokenizer"].max_length == length
    assert checkpoint.graphs[0].inputs[0].shape == ("batch", length)
    assert checkpoint.graphs[0].outputs[0].shape == ("batch", length, 64)
    line = f"model_max_length is {said} and the text encoder reads up to 77 tokens; prompts are cut into pieces of "
    line += str(length)
    assert (line in caplog.text) == (said in (64, 200))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"eos_token": {}}, "says eos_token={}, which is no token"),
        ({"pad_token": ["a"]}, r"says pad_token=\['a'\], which is no token"),
        ({"bos_token": 3}, "says bos_token=3, which is no token"),
        ({"model_max_length": float("inf")}, "says model_max_length=inf; valid: 3 or more"),
        ({"model_max_length": float("nan")}, "says model_max_length=nan; valid: 3 or more"),
        ({"model_max_length": "77"}, "says model_max_length='77'; valid: 3 or more"),
    ],
)
def test_settings_of_a_tokenizer_that_are_none(copied: Maker, settings: dict[str, Any], said: str) -> None:
    source = copied("sd1")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        edit(source / "tokenizer" / name, **settings)
    with pytest.raises(CheckpointError, match=said):
        load_checkpoint(source)


def test_lengths_that_no_unet_reads_are_refused(copied: Maker) -> None:
    source = copied("sdxl")
    edit(source / "tokenizer_2" / "tokenizer_config.json", model_max_length=64)
    with pytest.raises(CheckpointError, match="read prompts of 64 and 77 tokens, and the UNet reads them side by side"):
        load_checkpoint(source)
    edit(source / "tokenizer" / "tokenizer_config.json", model_max_length=2)
    with pytest.raises(CheckpointError, match="tokenizer says model_max_length=2; valid: 3 or more"):
        load_checkpoint(source)
