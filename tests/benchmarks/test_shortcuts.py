"""Shortcuts in attention: nothing left out is nothing lost, and what is left out is what they say."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import shortcuts
from benchmarks.micro import shortcuts as timed
from benchmarks.shortcuts import KeptAttention, Merge, MergedAttention, Mode
from calotype.export.models.layers import Attention
from calotype.export.models.unet import UNet, UNetConfig
from calotype.runtime.bundle.form import FLOAT32
from calotype.runtime.denoising.job import SessionKey
from calotype.runtime.pipeline import Pipeline
from calotype.runtime.sessions.onnxruntime_cpu import OnnxRuntimeCpuSession

STEPS = 2


def tokens(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_merged_tokens_are_the_most_alike_and_come_back_as_their_mean() -> None:
    x = tokens(2, 16, 8)
    x[:, 1] = 1.001 * x[:, 0]  # nobody is more alike
    merge = Merge(x, 1)
    fewer = merge.fewer(x)
    assert fewer.shape == (2, 15, 8)
    back = merge.back(fewer)
    mean = (x[:, 0] + x[:, 1]) / 2
    torch.testing.assert_close(back[:, 0], mean)
    torch.testing.assert_close(back[:, 1], mean)
    torch.testing.assert_close(back[:, 2:], x[:, 2:])


def test_at_most_three_of_four_tokens_are_merged() -> None:
    x = tokens(1, 64, 8)
    fewer = Merge(x, 64).fewer(x)
    assert fewer.shape == (1, 16, 8)
    torch.testing.assert_close(
        Merge(x, 64).back(torch.arange(16.0).reshape(1, 16, 1))[0, ::2][:4, 0], torch.arange(4.0)
    )


def test_merging_equal_tokens_changes_attention_not_at_all() -> None:
    attention = Attention(8, heads=2).eval()
    # Each 2x2 of tokens is one token four times, so merging three of four leaves every one once.
    x = tokens(1, 4, 4, 8).repeat_interleave(2, dim=1).repeat_interleave(2, dim=2).reshape(1, 64, 8)
    exact = attention(x)
    attention.__class__ = MergedAttention
    attention.merged, attention.tokens = 0.75, 64
    torch.testing.assert_close(attention(x), exact, rtol=1e-5, atol=1e-6)
    attention.tokens = 256  # another level's
    torch.testing.assert_close(attention(x), exact)


def test_kept_cross_attention_is_the_last_one_and_its_mean_without_guidance() -> None:
    attention = Attention(8, heads=2, context_dim=6).eval()
    attention.__class__ = KeptAttention
    first = attention(tokens(2, 16, 8), tokens(2, 5, 6))
    attention.keeping = True
    assert attention(tokens(2, 16, 8) + 1, tokens(2, 5, 6) + 1) is first
    torch.testing.assert_close(attention(tokens(1, 16, 8), tokens(1, 5, 6)), first.mean(dim=0, keepdim=True))


@pytest.fixture(scope="module")
def drawing() -> Iterator[tuple[Pipeline, shortcuts.TorchUNet, np.ndarray]]:
    """Talbot with its UNet in PyTorch, and what it draws with the engine in its place."""
    with Pipeline.load("talbot", "cpu") as pipeline:
        exact = draw(pipeline)
        stand_in = shortcuts.TorchUNet(pipeline.networks.sessions[SessionKey("unet", FLOAT32)], shortcuts.load())
        stand_in.steps = STEPS
        pipeline.networks.sessions[SessionKey("unet", FLOAT32)] = stand_in
        yield pipeline, stand_in, exact


def draw(pipeline: Pipeline) -> np.ndarray:
    return np.asarray(pipeline("a frog, noto style", seed=0, num_inference_steps=STEPS).images[0], int)


@pytest.mark.parametrize(
    ("mode", "same"),
    [
        (Mode(), True),
        (Mode(after=0.5), False),
        (Mode(after=0.5, gated=True), False),
        (Mode(merged=0.5), False),
        (Mode(), True),  # a picture does not depend on the one before
    ],
)
def test_talbot_draws_in_pytorch_what_it_draws_in_the_engine(
    mode: Mode, same: bool, drawing: tuple[Pipeline, shortcuts.TorchUNet, np.ndarray]
) -> None:
    pipeline, stand_in, exact = drawing
    stand_in.mode = mode
    assert (abs(draw(pipeline) - exact).max() <= 2) == same


SMALL = UNetConfig(
    block_out_channels=(32,),
    down_block_types=("CrossAttnDownBlock2D",),
    up_block_types=("CrossAttnUpBlock2D",),
    layers_per_block=1,
    attention_head_dim=4,
    cross_attention_dim=16,
)
SIZES = {"rows": 2, "tokens": 7, "height": 8, "width": 8}


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, UNet, dict[str, Any]]:
    """A folder with the graphs of a small UNet, whole and with merged tokens; the model is left as the latter is."""
    torch.manual_seed(0)
    folder, model, specs = tmp_path_factory.mktemp("graphs"), UNet(SMALL).eval(), {}
    for name, merged in (("whole", 0.0), ("merged", 0.5)):
        timed.change(model, merged, 64, without=False)
        specs[name] = timed.write(model.half().float(), SIZES, folder, name)
    return folder, model, specs


def test_a_graph_with_merged_tokens_computes_what_pytorch_does(graphs: tuple[Path, UNet, dict[str, Any]]) -> None:
    folder, model, specs = graphs
    found = []
    for name, merged in (("whole", 0.0), ("merged", 0.5)):
        timed.change(model, merged, 64, without=False)
        with OnnxRuntimeCpuSession(folder, specs[name]) as session:
            session.reserve(SIZES)
            inputs = {}
            for each in session.inputs:
                session.buffer(each.name, SIZES)[:] = tokens(*each.shape).numpy()
                inputs[each.name] = torch.from_numpy(session.buffer(each.name, SIZES))
            session.run(SIZES)
            found.append(session.buffer("noise_pred", SIZES).copy())
            with torch.inference_mode():
                expected = model(inputs["sample"], inputs["timestep"], inputs["encoder_hidden_states"])
        np.testing.assert_allclose(found[-1], expected, atol=1e-4)
    assert abs(found[0] - found[1]).max() > 1e-3


def test_steps_are_timed_beside_the_whole_one(
    graphs: tuple[Path, UNet, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each form's graph is written of the model as it is then; here the small UNet's stand for all of them."""
    folder, _, specs = graphs
    written: list[tuple[type, type]] = []

    def write(model: UNet, _sizes: Any, _folder: Path, _name: str) -> Any:
        written.extend({(type(block.attn1), type(block.attn2)) for block in shortcuts.blocks(model)})
        return specs["whole" if type(next(shortcuts.blocks(model)).attn1) is Attention else "merged"]

    monkeypatch.setattr(timed, "write", write)
    opened = timed.opened
    monkeypatch.setattr(timed, "opened", lambda _, spec, sizes: opened(folder, spec, sizes))
    forms = {timed.WITHOUT: 0.0, "50% merged": 0.5}
    monkeypatch.setattr(timed, "TOKENS", SIZES["tokens"])
    results = [row.timed(1) for row in timed.steps(SMALL, 8, forms)]
    assert [list(result.forms) for result in results] == [[timed.WHOLE, form] for form in forms]
    assert all(result.forms[form]["ratio"]["median"] > 0 for result, form in zip(results, forms, strict=True))
    assert written == [(Attention, Attention), (Attention, shortcuts.LeftOut), (MergedAttention, Attention)]
