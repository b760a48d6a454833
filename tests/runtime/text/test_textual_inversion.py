"""Textual inversion: files of every layout, and prompts with their words, against diffusers'."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file

from calotype.runtime.bundle.manifest import TokenizerSpec
from calotype.runtime.errors import InputError
from calotype.runtime.pipeline import Pipeline
from calotype.runtime.text.prompts import chunked
from calotype.runtime.text.textual_inversion import Embedding, add_embeddings
from calotype.runtime.text.tokenizer import ClipTokenizer

PROMPTS = ("red <cat> apple", "<CAT>", "a <cat><cat> le", "easy", "an easy apple, easy", "red apple")


def vectors(rows: int, width: int = 32, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((rows, width), np.float32)


def saved(path: Path, **state: NDArray[Any]) -> Path:
    save_file(state, path)
    return path


def tokenizer_of(checkpoint: Path) -> ClipTokenizer:
    folder = checkpoint / "tokenizer"
    spec = TokenizerSpec(vocab="vocab.json", merges="merges.txt", max_length=32)
    return ClipTokenizer.from_files(folder / "vocab.json", folder / "merges.txt", spec)


def test_prompts_equal_diffusers(tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    one = saved(tmp_path / "one.safetensors", **{"<cat>": vectors(1)[0]})
    three = saved(tmp_path / "easy.safetensors", emb_params=vectors(3, seed=1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers

        reference = diffusers.StableDiffusionPipeline.from_pretrained(tiny_checkpoint, torch_dtype=torch.float16)
        reference.text_encoder.float()
        reference.load_textual_inversion(one)
        reference.load_textual_inversion(three, token="easy")
    embeddings = [Embedding.read(one), Embedding.read(three)]
    with (
        Pipeline.load(tiny_bundle, "cpu", embeddings=embeddings) as pipeline,
        Pipeline.load(tiny_bundle, "cpu") as bare,
    ):
        for prompt in PROMPTS:
            expected, _ = reference.encode_prompt(prompt, "cpu", 1, do_classifier_free_guidance=False)
            got = states(pipeline, prompt)
            np.testing.assert_allclose(got, expected[0].detach(), rtol=0, atol=1e-5, err_msg=prompt)
            assert np.array_equal(got, states(bare, prompt)) == (prompt == "red apple")


def test_a_word_of_letters_is_not_found_inside_others(tiny_bundle: Path, tmp_path: Path) -> None:
    embedding = Embedding.read(saved(tmp_path / "easy.safetensors", emb_params=vectors(2)))
    with (
        Pipeline.load(tiny_bundle, "cpu", embeddings=[embedding]) as pipeline,
        Pipeline.load(tiny_bundle, "cpu") as bare,
    ):
        for prompt in ("uneasy", "easyly red"):
            np.testing.assert_array_equal(states(pipeline, prompt), states(bare, prompt))


def states(pipeline: Pipeline, prompt: str) -> NDArray[np.float32]:
    return pipeline._preparation._conditioned(()).encode(prompt, None, 0)[0]["encoder_hidden_states"]


def test_two_encoders_have_their_own_vectors(sdxl: Any, tmp_path: Path) -> None:
    path = saved(tmp_path / "cat.safetensors", clip_l=vectors(2), clip_g=vectors(2, 24, seed=1))
    with Pipeline.load(sdxl.bundle, "cpu", embeddings=[Embedding.read(path)]) as pipeline:
        got = states(pipeline, "red cat")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers
        from safetensors.torch import load_file

        reference = diffusers.StableDiffusionXLPipeline.from_pretrained(sdxl.checkpoint, torch_dtype=torch.float16)
        for number in ("", "_2"):
            encoder = getattr(reference, f"text_encoder{number}").float()
            state = load_file(path)["clip_g" if number else "clip_l"]
            reference.load_textual_inversion(
                state, token="cat", text_encoder=encoder, tokenizer=getattr(reference, f"tokenizer{number}")
            )
        expected = reference.encode_prompt("red cat", device="cpu", do_classifier_free_guidance=False)[0]
    np.testing.assert_allclose(got, expected[0].detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("state", "token", "rows"),
    [
        ({"emb_params": vectors(3)}, "a.b", {"text_encoder": 3}),
        ({"emb_params": vectors(1)[0]}, "a.b", {"text_encoder": 1}),
        ({"clip_l": vectors(2), "clip_g": vectors(2, 40)}, "a.b", {"text_encoder": 2, "text_encoder_2": 2}),
        ({"<cat>": vectors(2).astype(np.float16)}, "<cat>", {"text_encoder": 2}),
    ],
)
def test_every_layout(tmp_path: Path, state: dict[str, Any], token: str, rows: dict[str, int]) -> None:
    path = saved(tmp_path / "a.b.safetensors", **state)
    embedding = Embedding.parse(str(path))
    assert embedding.token == token
    assert {name: len(value) for name, value in embedding.vectors.items()} == rows
    assert all(value.dtype == np.float32 for value in embedding.vectors.values())
    assert Embedding.parse(f"{path}:<dog>").token == "<dog>"


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": vectors(1), "b": vectors(1)}, r"is no textual inversion: it holds a, b; valid: emb_params"),
        ({"lora": np.zeros((1, 2, 3), np.float32)}, r"is no textual inversion: it holds lora"),
        ({"emb_params": np.zeros((1, 2), np.int64)}, r"is no textual inversion"),
        ({}, r"is no textual inversion: it holds nothing"),
        ({" ": vectors(1)}, r"has no word; give one: .*:WORD"),
        ({"<cat>": vectors(1) * np.nan}, r"values that are not finite"),
    ],
)
def test_files_that_are_none(tmp_path: Path, state: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        Embedding.read(saved(tmp_path / "a.safetensors", **state))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "is a git-lfs pointer .*; run: git lfs pull$"),
        (b"<!DOCTYPE html>\n<html>", "is a web page that was saved in the file's place; download the file itself"),
        (b"Entry not found", "is no file of weights but the text 'Entry not found'; download it again$"),
        (pickle.dumps({"a": 1}), r"is a pickle, which can hold code; fetch the embedding as \.safetensors"),
    ],
)
def test_what_is_no_safetensors_file_is_named(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=rf"a\.safetensors {expected}"):
        Embedding.parse(str(tmp_path / "a.safetensors"))


@pytest.mark.parametrize("name", ["a.pt", "a.bin", "a.pt:word", "a.PT"])
def test_a_pickle_is_refused_unopened(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"is a pickle, which can hold code; fetch the embedding as \.safetensors"):
        Embedding.parse(str(tmp_path / name))


def test_one_for_another_model_is_one_line(tiny_checkpoint: Path, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tiny_checkpoint)
    wide = Embedding.read(saved(tmp_path / "a.safetensors", emb_params=vectors(1, 48)))
    with pytest.raises(InputError, match=r"vectors for text_encoder of 48; this model's text_encoder takes 32"):
        add_embeddings([wide], "text_encoder", tokenizer, 520, 32)
    with pytest.raises(InputError, match=r"vectors for text_encoder of 48; this model's text_encoder_2 takes 48"):
        add_embeddings([wide], "text_encoder_2", tokenizer, 520, 48)


def test_a_word_that_is_taken_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    path = saved(tmp_path / "app.safetensors", emb_params=vectors(1))
    with pytest.raises(InputError, match=r"the word 'app' is in the vocabulary already; .*FILE:WORD"):
        add_embeddings([Embedding.read(path)], "text_encoder", tokenizer_of(tiny_checkpoint), 520, 32)
    twice = [Embedding.read(path, "<cat>")] * 2
    with pytest.raises(InputError, match=r"the word '<cat>' is in the vocabulary already"):
        add_embeddings(twice, "text_encoder", tokenizer_of(tiny_checkpoint), 520, 32)


def test_positions_count_every_vector(tiny_checkpoint: Path, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tiny_checkpoint)
    path = saved(tmp_path / "a.safetensors", emb_params=vectors(3))
    add_embeddings([Embedding.read(path, "<cat>")], "text_encoder", tokenizer, 520, 32)
    text = "red <cat> apple"
    ids = tokenizer.tokenize(text)
    assert ids[1:4] == [520, 521, 522]
    assert [tokenizer.position(text, number) for number in range(len(ids))] == [0, 4, 4, 4, 10]


@pytest.mark.parametrize(
    ("before", "count", "expected"),
    [
        (25, 10, [25, 11]),  # five of ten would have fitted
        (20, 10, [30, 1]),
        (0, 30, [30, 1]),
        (30, 3, [30, 4]),
        (5, 40, [30, 16]),  # more than any chunk holds
    ],
)
def test_an_embedding_is_not_cut_at_a_chunks_end(
    tiny_checkpoint: Path, tmp_path: Path, before: int, count: int, expected: list[int]
) -> None:
    tokenizer = tokenizer_of(tiny_checkpoint)
    (token,) = tokenizer.tokenize("red")
    path = saved(tmp_path / "cat.safetensors", **{"<cat>": vectors(count)})
    add_embeddings([Embedding.read(path)], "text_encoder", tokenizer, 1000, 32)
    chunks = chunked("red " * before + "(<cat>:1.5) red", tokenizer)
    ids = [[own for own in chunk.ids.tolist() if own == token or own >= 1000] for chunk in chunks]
    assert [len(row) for row in ids] == expected
    assert [own for row in ids for own in row] == [token] * before + [*range(1000, 1000 + count)] + [token]
    weights = [weight for chunk in chunks if chunk.weights is not None for weight in chunk.weights.tolist()]
    assert weights.count(1.5) == count
