"""Prompts with what other programs give a meaning: one warning each, and no word of it lost."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calotype.runtime.errors import InputError
from calotype.runtime.pipeline import Pipeline
from calotype.runtime.text.syntax import _short, prompt_warnings, take_loras


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (
            "a cat <lora:style:0.8>",
            "<lora:style:0.8> (give the file with --lora FILE:SCALE, or --prompt-loras to have it read)",
        ),
        ("<lyco:style>", "<lyco:style> (give the file with --lora FILE:SCALE, or --prompt-loras to have it read)"),
        ("<hypernet:style:1>", "<hypernet:style:1> (hypernetworks are not supported)"),
        ("a cat BREAK a dog", "BREAK (a chunk ends where it is full)"),
        ("a cat AND a dog :1.2", "AND (prompts are not composed; give one after the other)"),
        ("a [cat:dog:0.5]", "[cat:dog:0.5] (a prompt is the same at every step; write one out)"),
        ("a [cat::10]", "[cat::10] (a prompt is the same at every step; write one out)"),
        ("a [cat:.5]", "[cat:.5] (a prompt is the same at every step; write one out)"),
        ("a [cat|dog]", "[cat|dog] (words do not take turns; write one out)"),
        ("a [(red:1.2) cat|dog]", "[(red:1.2) cat|dog] (words do not take turns; write one out)"),
        ("a {cat|dog}", "{cat|dog} (none is chosen; write one out)"),
        ("__colour__ cat", "__colour__ (wildcards are not filled in; write one out)"),
        (f"__{'a' * 100}__ cat", f"__{'a' * 35}... (wildcards are not filled in; write one out)"),
        ("a <random:cat,dog>", "<random:cat,dog> (nothing is filled in; write it out)"),
        ("a cat <segment:face>", "<segment:face> (nothing is filled in; write it out)"),
        ("<alternate[2]:cat,dog>", "<alternate[2]:cat,dog> (nothing is filled in; write it out)"),
        ("a ADDCOMM b", "ADDCOMM (regions are not drawn apart; draw them one after the other with --mask)"),
        ("a (red hat)++, cat", ")++ (write (words:1.1) for more, (words:0.9) for less)"),
        ("a (red hat)-", ")- (write (words:1.1) for more, (words:0.9) for less)"),
        ('("a cat", "a dog").blend(1, 2)', ").blend(1, 2) (prompts are not composed; give one after the other)"),
        ("a ball++, cat", "ball++ (write (word:1.1) for more, (word:0.9) for less)"),
        ("a ball-- cat", "ball-- (write (word:1.1) for more, (word:0.9) for less)"),
        ("a embedding:easy, cat", "embedding:easy (give the file with --embedding and write its word alone)"),
    ],
)
def test_what_is_read_as_words_is_said(prompt: str, said: str) -> None:
    assert prompt_warnings(prompt) == [f"the prompt {_short(prompt)!r} has what is read as words: {said}"]


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "a red apple",
        "a (red:1.3) [apple], [[green]] leaf",
        "salt and pepper, take a break",
        "ANDES, BREAKFAST, BRAND",
        "a <cat> and <a dog>",
        r"\[cat:dog:0.5\] \[cat|dog\]",
        "[at 10:30 o'clock]",
        "[a: cat]",
        "| a || b |",
        "embedding: a word",
        "__ dunder __init",
        "{curly}",
        "C++ (an old logo), a (red)-haired cat",
        "ADDING <b: bold>",
        f"__{'a' * 101}__ cat",  # longer than a wildcard's name: each would be looked through from every place
    ],
)
def test_what_means_nothing_elsewhere_is_not(prompt: str) -> None:
    assert prompt_warnings(prompt) == []


def test_several_are_one_line_and_quoted_in_short() -> None:
    (line,) = prompt_warnings("<lora:a:1> BREAK " + "x" * 100 + " [a|b] [c|d] [c|d] {e|f} AND")
    assert line.startswith(
        "the prompt '<lora:a:1> BREAK xxxxxxxxxxxxxxxxxxxx...' has what is read as words: <lora:a:1> ("
    )
    assert line.endswith(" and 2 more")
    assert "\n" not in prompt_warnings("a\nBREAK\n<lora:\n\nb>")[0]


@pytest.mark.parametrize("text", ["[", "[:", "[a:", "<lora:", "__", "{", "_", "embedding:", "[1", "\\[", "[0:1"])
def test_hostile_prompts_take_no_time(text: str) -> None:
    # Were this quadratic, it would not end.
    prompt_warnings(text * 20_000)


@pytest.mark.parametrize("text", ["<lora:", "<lora:a:1", "<lora:a:1>", "<", "<lora:<", "<lyco:a:"])
def test_hostile_loras_take_no_time(text: str) -> None:
    with contextlib.suppress(InputError):
        take_loras(text * 100_000)


@given(st.text(alphabet="[]{}<>|:_\\ aBREAKND.1(", max_size=60))
def test_any_text_has_at_most_one_warning(prompt: str) -> None:
    assert len(prompt_warnings(prompt)) <= 1


def test_a_call_warns_of_each_prompt_once(tiny_bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Pipeline.load(tiny_bundle, "cpu") as pipeline, caplog.at_level(logging.WARNING):
        caplog.clear()
        pipeline(["red BREAK apple", "apple"], negative_prompt="[a|b]", num_images_per_prompt=2, num_inference_steps=1)
    assert [text.partition(" has ")[0] for text in caplog.messages] == [
        "the prompt 'red BREAK apple'",
        "the prompt '[a|b]'",
    ]
