"""The parts of training that can be told right from wrong without training."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from training import finetune
from training import run as training_run
from training.attention import PlainAttention
from training.captions import Concept, captions, held_out, sample_caption, sample_phrasing
from training.config import CPU, Budget, TrainingConfig
from training.run import EMA, Run
from training.synonyms import aligned
from training.unet import alphas_cumprod

APPLE = Concept(slug="red-apple", name="red apple", keywords=("fruit",), group=4)


def test_captions_name_the_concept_or_a_keyword_and_the_style() -> None:
    texts = captions(APPLE, "noto")
    assert "red apple, noto style" in texts
    assert "a red apple in noto style" in texts
    assert all("noto" in text and ("red apple" in text or "fruit" in text) for text in texts)
    assert len(set(texts)) == len(texts)
    rng = np.random.default_rng(0)
    drawn = {sample_caption(APPLE, "noto", rng) for _ in range(500)}
    assert drawn <= {*texts, "red apple", "a red apple"}
    assert {"red apple, noto style", "red apple"} <= drawn


def test_a_colour_stands_before_what_a_caption_calls_the_concept() -> None:
    rng = np.random.default_rng(0)
    pear = dataclasses.replace(APPLE, slug="pear", name="pear")
    drawn = {sample_caption(pear, "noto", rng, "orange") for _ in range(500)}
    assert {"orange pear, noto style", "an orange pear in noto style", "orange fruit, noto style"} <= drawn
    assert "orange pear, fruit, noto style" in drawn
    assert all(text.count("orange") == 1 for text in drawn)


def test_a_phrasing_holds_its_plain_caption_in_order() -> None:
    rng = np.random.default_rng(0)
    pairs = {sample_phrasing(APPLE, "noto", rng) for _ in range(2000)}
    for asked, plain in pairs:
        words = iter(re.findall(r"\w+", asked))
        assert all(word in words for word in re.findall(r"\w+", plain)), (asked, plain)
        assert asked != plain
    assert ("a drawing of red apple, noto style", "red apple, noto style") in pairs


def test_a_phrasings_tokens_take_the_states_of_the_caption_in_it() -> None:
    start, end, drawing, of, a, frog, please = range(7)
    plain = torch.tensor([[start, a, frog, end, end, end, end, end]])
    asked = torch.tensor([[start, drawing, of, a, frog, please, end, end]])
    assert aligned(asked, plain).tolist() == [[0, 0, 0, 1, 2, 2, 3, 4]]
    assert aligned(plain, plain).tolist() == [list(range(8))]


def test_the_held_out_rule_takes_about_a_twentieth_and_never_changes() -> None:
    out = [held_out(f"concept-{index}", "noto") for index in range(2000)]
    assert 60 < sum(out) < 140
    assert [held_out("red-apple", style) for style in ("noto", "twemoji", "fluent")] == [False, False, False]


def test_noise_schedule_is_diffusers_linear() -> None:
    import diffusers

    reference = diffusers.DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear").alphas_cumprod
    torch.testing.assert_close(alphas_cumprod(), reference, rtol=1e-4, atol=1e-7)


def config(tmp_path: Path) -> TrainingConfig:
    return dataclasses.replace(CPU, work=tmp_path)


def train_a_line(tmp_path: Path, budget: Budget, stop_at: int | None = None) -> tuple[Run, torch.nn.Linear]:
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    ema = EMA(model, 0.9)
    run = Run("line", config(tmp_path), budget)
    parts = {"model": model, "optimizer": optimizer, "ema": ema}
    run.resume(parts)
    for update in run.steps(optimizer, parts):
        if run.step == stop_at:
            run.save(parts)
            break
        inputs = torch.randn(4, 2) + float(run.rng.random())
        update((model(inputs) - 1).square().mean())
        ema.update(run.step)
    return run, model


def test_an_interrupted_run_is_the_run_that_was_not(tmp_path: Path) -> None:
    _, whole = train_a_line(tmp_path / "whole", Budget(steps=20))
    first, _ = train_a_line(tmp_path / "parts", Budget(steps=20), stop_at=7)
    assert first.step == 7
    second, parts = train_a_line(tmp_path / "parts", Budget(steps=20))
    assert second.step == 20
    assert torch.equal(whole.weight, parts.weight) and torch.equal(whole.bias, parts.bias)


def test_a_finished_run_trains_no_more_until_its_budget_grows(tmp_path: Path) -> None:
    _, trained = train_a_line(tmp_path, Budget(steps=5))
    again, same = train_a_line(tmp_path, Budget(steps=5))
    assert again.step == 5 and torch.equal(trained.weight, same.weight)
    longer, other = train_a_line(tmp_path, Budget(steps=8))
    assert longer.step == 8 and not torch.equal(trained.weight, other.weight)


class Clock:
    """Seconds that pass only when a test says so."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def monotonic(self) -> float:
        return self.seconds


@pytest.mark.parametrize(("first", "other", "steps"), [(60.0, 0.25, 3), (0.25, 0.25, 3), (0.0, 0.1, 6), (60.0, 9.0, 2)])
def test_minutes_end_a_run_and_the_first_step_which_compiles_takes_none_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: float, other: float, steps: int
) -> None:
    clock, model = Clock(), torch.nn.Linear(2, 1)
    monkeypatch.setattr(training_run, "time", clock)
    run = Run("line", config(tmp_path), Budget(steps=10**9, minutes=0.5 / 60))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for update in run.steps(optimizer, {"model": model}):
        clock.seconds += first if run.step == 0 else other
        update(model(torch.ones(2)).square().mean())
    assert run.step == steps
    assert run.spent == pytest.approx(other * (steps - 1))
    again = Run("line", config(tmp_path), Budget(steps=10**9, minutes=0.5 / 60))
    again.resume({"model": model})
    assert (again.step, again.progress) == (steps, 1.0)


def test_plain_attention_gives_what_the_fused_one_gives() -> None:
    query, key, value = (torch.randn(2, 3, tokens, 8, requires_grad=True) for tokens in (5, 7, 7))
    expected = F.scaled_dot_product_attention(query, key, value)
    masked = F.scaled_dot_product_attention(query, query, query, is_causal=True)
    expected.square().sum().backward()
    gradients = [tensor.grad for tensor in (query, key, value)]
    with PlainAttention():
        got = F.scaled_dot_product_attention(query, key, value)
        torch.testing.assert_close(F.scaled_dot_product_attention(query, query, query, is_causal=True), masked)
    assert got.grad_fn is not None
    assert expected.grad_fn is not None
    assert got.grad_fn.name() != expected.grad_fn.name()
    for tensor in (query, key, value):
        tensor.grad = None
    got.square().sum().backward()
    torch.testing.assert_close(got, expected)
    for tensor, gradient in zip((query, key, value), gradients, strict=True):
        torch.testing.assert_close(tensor.grad, gradient)


def test_finetuning_asks_in_every_way() -> None:
    rng = np.random.default_rng(0)
    asked = {finetune.caption(APPLE, "noto", ("pomme",), rng, None) for _ in range(300)}
    assert "red apple, noto style" in asked
    assert "pomme, noto style" in asked
    assert any("draw" in text for text in asked)
    ball = Concept(slug="ball", name="ball", keywords=(), group=5)
    assert all("blue ball" in finetune.caption(ball, "noto", (), rng, "blue") for _ in range(100))
