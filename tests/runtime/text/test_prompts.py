"""Weights and long prompts: the syntax, what weights do to embeddings, chunks against transformers, the cache."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calotype.runtime import arguments
from calotype.runtime.arguments import MOST_CHARACTERS
from calotype.runtime.bundle.folder import Bundle
from calotype.runtime.errors import InputError
from calotype.runtime.pipeline import Pipeline
from calotype.runtime.sessions import open_session
from calotype.runtime.text.encoders import ClipConditioner, TextEncoder
from calotype.runtime.text.prompts import MAX_CHUNKS, chunked, parse_prompt
from calotype.runtime.text.tokenizer import ClipTokenizer
from tests.runtime.references import diffusers_pipeline, psnr


@pytest.fixture(scope="module")
def tokenizer(format1: Path) -> ClipTokenizer:
    spec = Bundle.open(format1).manifest.tokenizers["tokenizer"]
    return ClipTokenizer.from_files(format1 / spec.vocab, format1 / spec.merges, spec)


class Counted:
    """A session that counts its runs."""

    def __init__(self, session: Any) -> None:
        self.session, self.runs = session, 0
        self.inputs, self.outputs = session.inputs, session.outputs
        self.reserve, self.buffer, self.write = session.reserve, session.buffer, session.write

    def run(self, sizes: Any) -> None:
        self.runs += 1
        self.session.run(sizes)


@pytest.fixture
def session(tiny_bundle: Path) -> Any:
    spec = Bundle.open(tiny_bundle).manifest.networks["text_encoder"]
    with open_session(tiny_bundle, spec, "cpu") as opened:
        yield Counted(opened)


@pytest.fixture
def conditioner(tokenizer: ClipTokenizer, session: Any) -> ClipConditioner:
    return ClipConditioner([TextEncoder(tokenizer, session)], force_zeros_for_empty_prompt=False)


def states(conditioner: ClipConditioner, prompt: str, clip_skip: int = 0) -> Any:
    return conditioner.encode(prompt, None, clip_skip)[0]["encoder_hidden_states"]


@pytest.fixture(scope="module")
def reference(tiny_checkpoint: Path) -> Any:
    """Transformers' hidden states (T, D) of a list of ids, that many layers before the last, normalised."""
    import torch

    model = diffusers_pipeline(tiny_checkpoint, "StableDiffusionPipeline").text_encoder

    def encode(ids: Any, clip_skip: int = 0) -> Any:
        with torch.no_grad():
            hidden = model(torch.tensor(np.asarray(ids)[None]), output_hidden_states=True).hidden_states
            return model.final_layer_norm(hidden[-1 - clip_skip])[0].numpy()

    return encode


@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        ("", []),
        ("a red apple", [("a red apple", 1)]),
        ("a (red) apple", [("a ", 1), ("red", 1.1), (" apple", 1)]),
        ("a (red:1.3) apple", [("a ", 1), ("red", 1.3), (" apple", 1)]),
        ("a (red: 1.3 ) apple", [("a ", 1), ("red", 1.3), (" apple", 1)]),
        ("(red:.5)(apple:0)", [("red", 0.5), ("apple", 0)]),
        ("[red]", [("red", 1 / 1.1)]),
        ("((red))", [("red", 1.1 * 1.1)]),
        ("(a (red:1.5) apple:2)", [("a ", 2), ("red", 3), (" apple", 2)]),
        ("([red])", [("red", 1.1 / 1.1)]),
        ("(a:-1)", [("a", -1)]),
        (r"a \(red\) \[apple\] \\", [(r"a (red) [apple] " + "\\", 1)]),
        (r"(\(red\):2)", [("(red)", 2)]),
        (r"a \n b", [(r"a \n b", 1)]),
        # without a partner a bracket is text
        ("(red", [("(red", 1)]),
        ("red)", [("red)", 1)]),
        ("a :) b (: c ]", [("a :) b (: c ]", 1)]),
        ("red:1.3)", [("red:1.3)", 1)]),
        ("((red)", [("(", 1), ("red", 1.1)]),
        ("[red)", [("[red)", 1)]),
        ("(a [b) c]", [("a ", 1.1), ("b", 1.1 / 1.1), (" c", 1 / 1.1)]),
        # not weights
        ("(red:high)", [("red:high", 1.1)]),
        ("(12:30)", [("12", 30)]),
        ("(red:1.2.3)", [("red:1.2.3", 1.1)]),
        ("a: b", [("a: b", 1)]),
        ("()[]", []),
    ],
)
def test_the_syntax(prompt: str, pieces: list[tuple[str, float]]) -> None:
    got = parse_prompt(prompt)
    assert [text for text, _ in got] == [text for text, _ in pieces]
    assert [weight for _, weight in got] == pytest.approx([weight for _, weight in pieces])


@pytest.mark.parametrize(
    "part", [":" + "1" * 100, ":", "(", "[a", ": ", "\\", ":+", "(a:1", ":1.", "(a:1.1)", ")", "a", "(a:.5 ", "\\("]
)
def test_time_grows_with_the_length_alone(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice what is allowed is read to its end."""
    monkeypatch.setattr(arguments, "MOST_CHARACTERS", 2 * MOST_CHARACTERS)
    text = part * (2 * MOST_CHARACTERS // len(part))
    with contextlib.suppress(InputError):  # of a weight
        parse_prompt(text)


def test_a_weight_that_never_ends_is_no_weight() -> None:
    prompt = ":" + "1" * 10_000
    assert parse_prompt(prompt) == [(prompt, 1.0)]


@pytest.mark.parametrize(("part", "times"), [(":", 1_000_000), ("a", 5_000_000), ("a ", 10_001)])
def test_a_prompt_that_is_too_long_is_refused_at_once(tokenizer: ClipTokenizer, part: str, times: int) -> None:
    prompt = part * times
    with pytest.raises(InputError, match=rf"the prompt has {len(prompt)} characters; valid: up to {MOST_CHARACTERS}"):
        chunked(prompt, tokenizer)


@given(st.text(alphabet=st.characters(exclude_characters="()[]\\", codec="utf-8")))
def test_text_without_brackets_is_itself(text: str) -> None:
    assert parse_prompt(text) == ([(text, 1.0)] if text else [])


@given(st.text(alphabet="ab:1.()[]\\"))
def test_any_text_is_legal_and_loses_only_what_means_something(text: str) -> None:
    rest = iter(text)
    assert all(letter in rest for piece, _ in parse_prompt(text) for letter in piece)


def test_escaping_everything_gives_the_text_back() -> None:
    text = r"a (b:1.2) [c] \ d)(]["
    escaped = "".join("\\" + letter if letter in "()[]\\" else letter for letter in text)
    assert parse_prompt(escaped) == [(text, 1.0)]


def test_20_000_brackets() -> None:
    assert parse_prompt("(" * 10_000 + ")" * 10_000) == []
    assert parse_prompt("(" * 20_000) == [("(" * 20_000, 1.0)]


@pytest.mark.parametrize("prompt", ["(a:101)", "(a:-500)", "(" * 60 + "a" + ")" * 60, f"(a:{'9' * 400})"])
def test_a_weight_beyond_bounds_is_refused(prompt: str) -> None:
    with pytest.raises(InputError, match=r"the prompt weighs 'a' .*; valid: up to 100"):
        parse_prompt(prompt)


def test_a_prompt_without_weights_is_bit_identical_to_the_plain_path(
    conditioner: ClipConditioner, tokenizer: ClipTokenizer, session: Any
) -> None:
    for prompt in ("a red apple, le", "(red", "(red:1)", "((a))".replace("(", "\\(").replace(")", "\\)")):
        got = states(conditioner, prompt)
        text = "((a))" if "\\" in prompt else "red" if prompt == "(red:1)" else prompt
        sizes = {"batch": 1, "extra": 1}
        session.buffer("input_ids", sizes)[:] = tokenizer.pack(tokenizer.tokenize(text))
        session.buffer("clip_skip", sizes)[:] = 0
        session.run(sizes)
        assert got.tobytes() == session.buffer("hidden_states", sizes)[0].tobytes()


def test_a_weight_moves_a_token_away_from_the_empty_prompt(
    conditioner: ClipConditioner, tokenizer: ClipTokenizer, reference: Any
) -> None:
    red, apple = tokenizer.tokenize("red"), tokenizer.tokenize("apple")
    plain, empty = reference(tokenizer.pack(red + apple)), reference(tokenizer.pack([]))
    weights = np.ones((tokenizer.max_length, 1))
    weights[1 : 1 + len(red)] = 1.3
    weights[1 + len(red) : 1 + len(red + apple)] = 0.5
    expected = empty + weights * (plain - empty)
    got = states(conditioner, "(red:1.3)(apple:0.5)")
    assert np.abs(got - expected).max() < 1e-4
    assert np.abs(got - plain).max() > 0.1


@pytest.mark.parametrize("count", [0, 1, 29, 30, 31, 60, 61])
def test_a_long_prompt_is_chunks_one_after_the_other(
    conditioner: ClipConditioner, tokenizer: ClipTokenizer, reference: Any, count: int
) -> None:
    ids = tokenizer.tokenize("apple red " * 31)[:count]
    expected = [reference(tokenizer.pack(ids[start : start + 30])) for start in range(0, max(count, 1), 30)]
    got = states(conditioner, " ".join((["apple", "red"] * 31)[:count]))
    assert got.shape == (len(expected) * 32, 32)
    assert np.abs(got - np.concatenate(expected)).max() < 1e-4


def test_the_shorter_of_prompt_and_negative_prompt_is_filled_up(
    conditioner: ClipConditioner, tokenizer: ClipTokenizer, reference: Any
) -> None:
    for prompt, negative in (("apple " * 40, "le"), ("le", "apple " * 40)):
        both = conditioner.encode(prompt, negative)
        assert both[1] is not None
        long, short = (inputs["encoder_hidden_states"] for inputs in (both if prompt != "le" else both[::-1]))
        assert long.shape == short.shape == (64, 32)
        expected = [reference(tokenizer.pack(tokenizer.tokenize("le"))), reference(tokenizer.pack([]))]
        assert np.abs(short - np.concatenate(expected)).max() < 1e-4


@pytest.mark.parametrize("clip_skip", [0, 1, 2])
def test_clip_skip_leaves_out_the_last_layers(
    conditioner: ClipConditioner, tokenizer: ClipTokenizer, reference: Any, clip_skip: int
) -> None:
    expected = reference(tokenizer.pack(tokenizer.tokenize("red apple")), clip_skip)
    assert np.abs(states(conditioner, "red apple", clip_skip) - expected).max() < 1e-4


def test_long_prompts_and_clip_skip_equal_diffusers_to_50_db(
    tiny_bundle: Path, tiny_checkpoint: Path, tokenizer: ClipTokenizer, reference: Any
) -> None:
    import torch

    # Embeddings are given: diffusers' own clip_skip fails with transformers 5, and passes over the negative prompt.
    settings: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 3.0, "height": 32, "width": 48}
    settings["output_type"] = "np"
    latents = np.random.default_rng(1).standard_normal((1, 4, 16, 24), np.float32)
    ids = tokenizer.tokenize("red apple " * 20)
    prompts = [tokenizer.pack(ids[:30]), tokenizer.pack(ids[30:])], [tokenizer.pack(tokenizer.tokenize("le"))]
    prompts[1].append(tokenizer.pack([]))
    conditional, unconditional = (
        torch.from_numpy(np.concatenate([reference(chunk, 1) for chunk in chunks])[None]) for chunks in prompts
    )
    diffusers = diffusers_pipeline(tiny_checkpoint, "StableDiffusionPipeline")
    expected = diffusers(
        prompt_embeds=conditional,
        negative_prompt_embeds=unconditional,
        latents=torch.from_numpy(latents.copy()),
        **settings,
    ).images[0]
    with Pipeline.load(tiny_bundle) as pipeline:
        got = pipeline("red apple " * 20, negative_prompt="le", clip_skip=1, latents=latents, **settings).images[0]
    assert psnr(got, expected) >= 50


@pytest.mark.parametrize(
    ("clip_skip", "message"),
    [
        (-1, "clip_skip=-1 is less than 0; use 0 or more"),
        (4, r"clip_skip=4 is more than the \d layers that .* can leave out; use fewer"),
        (0.5, r"clip_skip=0\.5 is not a whole number"),
    ],
)
def test_a_bad_clip_skip_gets_one_line(tiny_bundle: Path, clip_skip: Any, message: str) -> None:
    with Pipeline.load(tiny_bundle) as pipeline, pytest.raises(InputError, match=message):
        pipeline("a", clip_skip=clip_skip)


def test_a_prompt_is_encoded_once_for_each_thing_it_depends_on(conditioner: ClipConditioner, session: Any) -> None:
    conditioner.encode("red", "le")
    assert session.runs == 2
    conditioner.encode("red", "le")
    conditioner.encode("le", "red")
    assert session.runs == 2
    conditioner.encode("red", "le", clip_skip=1)
    assert session.runs == 4
    conditioner.encode("(red:1.2)", "le")  # only the empty prompt is new
    assert session.runs == 5
    first, second = states(conditioner, "(red:1.2)"), states(conditioner, "(red:1.4)")
    assert session.runs == 5
    assert (first != second).any()


def test_what_does_not_fit_is_quoted_in_short(tokenizer: ClipTokenizer, caplog: pytest.LogCaptureFixture) -> None:
    fitting = "apple " * (30 * MAX_CHUNKS)
    with caplog.at_level(logging.WARNING):
        assert len(chunked(fitting, tokenizer)) == MAX_CHUNKS
        assert caplog.records == []
        assert len(chunked(fitting + "red", tokenizer)) == MAX_CHUNKS
        assert len(chunked(f"{fitting}(red) (apple)", tokenizer)) == MAX_CHUNKS
        assert len(chunked("a" * 20_000, tokenizer)) == MAX_CHUNKS
    assert [record.getMessage() for record in caplog.records[:2]] == [
        "the prompt has more than 480 tokens; cut off from here: 'red'"
    ] * 2
    assert len(caplog.records) == 3
    assert len(caplog.text) < 800
