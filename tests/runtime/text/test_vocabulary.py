"""What a model was not taught is said, once, and drawn all the same."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from calotype.runtime.bundle.folder import BUNDLED
from calotype.runtime.errors import BundleError
from calotype.runtime.pipeline import Pipeline
from calotype.runtime.text.vocabulary import read_words, unknown_words


@pytest.fixture(scope="module")
def pipeline() -> Iterator[Pipeline]:
    with Pipeline.load("talbot", "cpu") as opened:
        yield opened


def test_the_words_of_a_prompt_that_are_not_known() -> None:
    words = frozenset({"a", "red", "apple"})
    assert unknown_words("A (red:1.3) apple, APPLE 3", words) == []
    assert unknown_words("a lighthouse at dusk, a lighthouse", words) == ["lighthouse", "at", "dusk"]
    assert unknown_words("", words) == []


def test_talbot_knows_what_it_was_taught() -> None:
    words = read_words(BUNDLED / "talbot" / "words.txt")
    for prompt in (
        "red apple, noto style",
        "a drawing of a grinning face in twemoji style",
        "please draw a green dragon",
    ):
        assert unknown_words(prompt, words) == []
    assert unknown_words("a lighthouse at dusk", words) == ["lighthouse"]


def test_unknown_words_and_far_sizes_are_said_once(pipeline: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        pipeline("a lighthouse", num_inference_steps=1, width=512)
    assert [record.message for record in caplog.records if record.levelno == logging.WARNING] == [
        "talbot was not taught these words, and what it draws for them is chance: lighthouse",
        "512x128 is far from the 128x128 of talbot itself; expect repeated or broken shapes",
    ]
    caplog.clear()
    pipeline("red apple, noto style", num_inference_steps=1, width=192)
    assert not caplog.records


def test_a_list_of_words_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(BundleError, match=r"words\.txt is no list of words"):
        read_words(tmp_path / "words.txt")
