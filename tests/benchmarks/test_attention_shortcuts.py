"""Shortcuts in attention: nothing left out is nothing lost, and what is left out is what they say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import attention_shortcuts as shortcuts
from benchmarks.attention_shortcuts import KeptAttention, Merge, MergedAttention, Mode
from calotype.export.models.layers import Attention
from calotype.export.models.unet import UNet, UNetConfig
from calotype.runtime.bundle.form import FLOAT32
from calotype.runtime.pipeline import Pipeline
from calotype.runtime.sessions.onnxruntime_cpu import OnnxRuntimeCpuSession


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


@pytest.mark.parametrize(
    ("mode", "same"),
    [
        (Mode(), True),
        (Mode(after=0.5), False),
        (Mode(after=0.5, gated=True), False),
        (Mode(merged=0.5), False),
    ],
)
def test_talbot_draws_in_pytorch_what_it_draws_in_the_engine(mode: Mode, same: bool) -> None:
    with Pipeline.load("talbot", "cpu") as pipeline:
        exact = np.asarray(pipeline("a frog, noto style", seed=0, num_inference_steps=4).images[0], int)
        stand_in = shortcuts.TorchUNet(pipeline._networks._sessions["unet", FLOAT32], shortcuts.load())
        stand_in.mode, stand_in.steps = mode, 4
        pipeline._networks._sessions["unet", FLOAT32] = stand_in
        for _ in range(2):  # a picture does not depend on the one before
            own = np.asarray(pipeline("a frog, noto style", seed=0, num_inference_steps=4).images[0], int)
            assert (abs(own - exact).max() <= 2) == same


SMALL = UNetConfig(
    block_out_channels=(32, 32),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    attention_head_dim=4,
    cross_attention_dim=16,
)


def test_a_graph_with_merged_tokens_computes_what_pytorch_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = UNet(SMALL).eval()
    sizes = {"rows": 2, "tokens": 7, "height": 8, "width": 8}
    found = []
    for name, merged in (("whole", 0.0), ("merged", 0.5)):
        for block in shortcuts.blocks(model):
            block.attn1.__class__ = MergedAttention if merged else Attention
            block.attn1.merged, block.attn1.tokens = merged, 64
        spec = shortcuts.write(model.half().float(), sizes, tmp_path, name)
        with OnnxRuntimeCpuSession(tmp_path, spec) as session:
            session.reserve(sizes)
            inputs = {}
            for each in session.inputs:
                session.buffer(each.name, sizes)[:] = tokens(*each.shape).numpy()
                inputs[each.name] = torch.from_numpy(session.buffer(each.name, sizes))
            session.run(sizes)
            found.append(session.buffer("noise_pred", sizes).copy())
            with torch.inference_mode():
                expected = model(inputs["sample"], inputs["timestep"], inputs["encoder_hidden_states"])
        np.testing.assert_allclose(found[-1], expected, atol=1e-4)
    assert abs(found[0] - found[1]).max() > 1e-3


def test_steps_are_timed_in_turns_and_told_as_ratios() -> None:
    report = shortcuts.sd1(SMALL, 8, 2, {"whole": 0.0, "without cross-attention": 0.0})
    assert report["ratio"].keys() == {"without cross-attention"}
    assert report["ratio"]["without cross-attention"]["median"] > 0
