"""Folders and headers by PEFT and diffusers, of every kind and setting that is read, against PEFT's own merging."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from numpy.typing import NDArray
from peft.tuners.boft import layer as boft_layer
from safetensors.numpy import load_file, save_file

from calotype.runtime.adapters.lora import Lora, merge
from calotype.runtime.errors import InputError

State = dict[str, NDArray[Any]]
LINEAR = ["to_q", "to_k", "fc1"]
ALL = [*LINEAR, "conv_in"]


class Attention(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k = torch.nn.Linear(12, 8), torch.nn.Linear(12, 8)


class Net(torch.nn.Module):
    """A few layers under names that patterns tell apart."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = torch.nn.Conv2d(4, 8, 3)
        self.attn1, self.attn2 = Attention(), Attention()
        self.mlp = torch.nn.ModuleDict({"fc1": torch.nn.Linear(8, 8)})
        self.norm = torch.nn.LayerNorm(8)
        self.words = torch.nn.Embedding(10, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def state_of(module: torch.nn.Module) -> State:
    return {name: value.detach().numpy().copy() for name, value in module.state_dict().items()}


def adapted(config: Any, folder: Path, net: torch.nn.Module | None = None) -> tuple[State, State]:
    """Save an adapter with random tensors; the model's own weights, and those merged by PEFT, which reads it again.

    It is read again since PEFT sorts patterns when it writes them, and the first that fits counts.
    """
    torch.manual_seed(3)
    net = Net() if net is None else net
    before, fresh = state_of(net), copy.deepcopy(net)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(net, config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(folder)
        return before, state_of(peft.PeftModel.from_pretrained(fresh, folder).merge_and_unload())


def assert_merged(merged: Mapping[str, NDArray[Any]], before: State, expected: State) -> None:
    """``merged`` is what PEFT changed, and nothing else."""
    changed = {name for name, value in expected.items() if not np.array_equal(value, before[name])}
    assert changed == merged.keys()
    for name in changed:
        tolerance = 1e-5 * np.abs(expected[name]).max()
        np.testing.assert_allclose(merged[name], expected[name], rtol=0, atol=tolerance, err_msg=name)


LORA = {"r": 3, "lora_alpha": 7, "target_modules": ALL}
CONFIGS = {
    "lora": peft.LoraConfig(**LORA),
    "defaults": peft.LoraConfig(target_modules=ALL),
    "rank-stabilised": peft.LoraConfig(**LORA, use_rslora=True),
    "regular-expression": peft.LoraConfig(**LORA, alpha_pattern={r"attn\d\.to_q": 64}),
    "first-of-two": peft.LoraConfig(**LORA, alpha_pattern={"to_q": 2, "attn1.to_q": 64}),
    "first-of-two-again": peft.LoraConfig(**LORA, alpha_pattern={"attn1.to_q": 64, "to_q": 2}),
    "whole-names": peft.LoraConfig(**LORA, alpha_pattern={"^attn1.to_q": 64, "^to_k": 3, "n1.to_k": 5}),
    "ranks": peft.LoraConfig(**LORA, rank_pattern={r".*attn1\.(to_q|to_k)": 2, "conv_in": 4}),
    "dora": peft.LoraConfig(**LORA, use_dora=True),
    "biases-of-b": peft.LoraConfig(**LORA, lora_bias=True),
    "all-biases": peft.LoraConfig(**LORA, bias="all"),
    "biases-of-its-own": peft.LoraConfig(**LORA, bias="lora_only"),
    "saved-modules": peft.LoraConfig(**LORA, modules_to_save=["norm"]),
    "embedding": peft.LoraConfig(r=3, lora_alpha=7, target_modules=["words", "to_q"]),
    "loha": peft.LoHaConfig(r=2, alpha=5, target_modules=ALL, alpha_pattern={"attn1.to_q": 3}),
    "loha-tucker": peft.LoHaConfig(r=2, alpha=5, target_modules=ALL, use_effective_conv2d=True),
    "lokr": peft.LoKrConfig(r=1, alpha=5, target_modules=ALL, rank_pattern={"attn1.to_q": 2}),
    "lokr-both": peft.LoKrConfig(r=1, alpha=5, target_modules=ALL, decompose_both=True),
    "lokr-tucker": peft.LoKrConfig(r=1, alpha=5, target_modules=ALL, use_effective_conv2d=True),
    "lokr-whole": peft.LoKrConfig(r=8, alpha=5, target_modules=ALL),
    "oft": peft.OFTConfig(oft_block_size=4, target_modules=ALL, use_cayley_neumann=False),
    "oft-series": peft.OFTConfig(oft_block_size=4, target_modules=ALL, num_cayley_neumann_terms=5),
    "oft-series-of-three": peft.OFTConfig(oft_block_size=4, target_modules=ALL, num_cayley_neumann_terms=3),
    "oft-constrained": peft.OFTConfig(oft_block_size=4, target_modules=ALL, coft=True, eps=0.5),
    "oft-shared": peft.OFTConfig(oft_block_size=4, target_modules=ALL, block_share=True),
    "boft": peft.BOFTConfig(boft_block_size=4, target_modules=ALL),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_folder_equals_peft(tmp_path: Path, case: str) -> None:
    before, expected = adapted(copy.deepcopy(CONFIGS[case]), tmp_path / "adapter")
    merged = merge([Lora(path=tmp_path / "adapter")], {"unet": before})["unet"]
    assert_merged(merged, before, expected)
    assert merge([Lora(path=tmp_path / "adapter", scale=0)], {"unet": before}) == {}


class Blocks:
    """In place of PEFT's CUDA extension, without which it has one stage alone."""

    @staticmethod
    def forward(blocks: torch.Tensor) -> list[torch.Tensor]:
        return [torch.stack([torch.block_diag(*stage) for stage in blocks])]


@pytest.mark.parametrize("stages", [2, 3])
def test_a_butterfly_of_several_stages_equals_peft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stages: int
) -> None:
    monkeypatch.setattr(boft_layer, "get_fbd_cuda", lambda: Blocks)
    net = torch.nn.ModuleDict({"to_q": torch.nn.Linear(16, 6), "conv_in": torch.nn.Conv2d(16, 4, 3)})
    config = peft.BOFTConfig(
        boft_block_size=4, boft_n_butterfly_factor=stages, target_modules=["to_q", *(["conv_in"] if stages < 3 else [])]
    )
    before, expected = adapted(config, tmp_path, net)
    assert_merged(merge([Lora(path=tmp_path)], {"unet": before})["unet"], before, expected)


@pytest.mark.parametrize(("case", "scale"), [("lora", 0.7), ("dora", 0.7), ("dora", -0.5), ("biases-of-b", 0.3)])
def test_less_of_it_is_what_peft_scales(tmp_path: Path, case: str, scale: float) -> None:
    torch.manual_seed(3)
    net = Net()
    before = state_of(net)
    adapted(copy.deepcopy(CONFIGS[case]), tmp_path, net)
    torch.manual_seed(3)
    model = peft.PeftModel.from_pretrained(Net(), tmp_path)
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.set_scale("default", scale)
    expected = state_of(model.merge_and_unload())
    assert_merged(merge([Lora(path=tmp_path, scale=scale)], {"unet": before})["unet"], before, expected)


def test_a_whole_model_in_folders_of_its_networks(tmp_path: Path) -> None:
    unet, unet_merged = adapted(peft.LoraConfig(**LORA), tmp_path / "unet")
    torch.manual_seed(4)
    text = torch.nn.ModuleDict({"layers": torch.nn.ModuleDict({"fc1": torch.nn.Linear(6, 4)})})
    config = peft.LoraConfig(r=2, lora_alpha=5, target_modules=["fc1"], alpha_pattern={"^layers.fc1": 9})
    own, own_merged = adapted(config, tmp_path / "text_encoder", text)
    # On disk a text encoder has a prefix that transformers 5 leaves out in memory.
    weights = {"unet": unet, "text_encoder": {f"text_model.{name}": value for name, value in own.items()}}
    merged = merge([Lora(path=tmp_path)], weights)
    assert_merged(merged["unet"], unet, unet_merged)
    assert_merged({n.removeprefix("text_model."): v for n, v in merged["text_encoder"].items()}, own, own_merged)


def test_a_text_encoders_own_folder_finds_the_encoder_whose_shapes_fit(tmp_path: Path) -> None:
    encoders = [torch.nn.ModuleDict({"fc1": torch.nn.Linear(width, 4)}) for width in (6, 8)]
    weights = {
        name: {f"text_model.{key}": value for key, value in state_of(net).items()}
        for name, net in zip(("text_encoder", "text_encoder_2"), encoders, strict=True)
    }
    for name, net in zip(list(weights), encoders, strict=True):
        config = peft.LoraConfig(r=2, lora_alpha=5, target_modules=["fc1"])
        _, expected = adapted(config, tmp_path / f"x-{name}", net)
        merged = merge([Lora(path=tmp_path / f"x-{name}")], weights)
        assert list(merged) == [name]
        np.testing.assert_allclose(merged[name]["text_model.fc1.weight"], expected["fc1.weight"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("key", ["lora_A.default.weight", "lora_A.style.weight"])
def test_an_adapters_name_in_the_keys(tmp_path: Path, key: str) -> None:
    before, expected = adapted(peft.LoraConfig(**LORA | {"lora_alpha": 3}), tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    name = key.split(".")[1]
    named = {key.replace("lora_A", f"lora_A.{name}").replace("lora_B", f"lora_B.{name}"): v for key, v in state.items()}
    save_file(named, tmp_path / "raw.safetensors")
    assert_merged(merge([Lora(path=tmp_path / "raw.safetensors")], {"unet": before})["unet"], before, expected)
    both = named | {key.replace(f".{name}.", ".other."): value for key, value in named.items()}
    save_file(both, tmp_path / "both.safetensors")
    with pytest.raises(InputError, match=f"holds several adapters: .*{name}.*; save each alone"):
        merge([Lora(path=tmp_path / "both.safetensors")], {"unet": before})


def diffusers_unet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers

        torch.manual_seed(2)
        return diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32,),
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
            layers_per_block=1,
            attention_head_dim=4,
            cross_attention_dim=16,
        )


@pytest.mark.parametrize("layout", ["adapter", "adapter's folder", "pipeline", "pipeline's folder"])
def test_diffusers_headers_equal_diffusers(tmp_path: Path, layout: str) -> None:
    import diffusers
    from peft.utils import get_peft_model_state_dict

    unet = diffusers_unet()
    before = state_of(unet)
    unet.add_adapter(
        peft.LoraConfig(
            r=4,
            lora_alpha=4,
            target_modules=["to_q", "to_k", "conv1"],
            alpha_pattern={r"attn\d\.to_q": 64, "attn1.to_q": 2},
            rank_pattern={"conv1": 2},
        )
    )
    for name, parameter in unet.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    if "adapter" in layout:
        unet.save_lora_adapter(tmp_path)
    else:
        diffusers.StableDiffusionPipeline.save_lora_weights(
            tmp_path,
            unet_lora_layers=get_peft_model_state_dict(unet),
            unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
        )
    fresh = diffusers_unet()
    fresh.load_lora_adapter(tmp_path, prefix=None if "adapter" in layout else "unet", use_safetensors=True)
    fresh.fuse_lora()
    fused = {name.replace(".base_layer", ""): value for name, value in state_of(fresh).items() if "lora_" not in name}
    path = tmp_path if "folder" in layout else tmp_path / "pytorch_lora_weights.safetensors"
    assert_merged(merge([Lora(path=path)], {"unet": before})["unet"], before, fused)


def folder_with(path: Path, **settings: Any) -> Path:
    adapted(peft.LoraConfig(**LORA), path)
    config = path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    return path


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "VERA"}, "is a PEFT adapter of the kind VERA, which is not supported; supported: LoRA"),
        ({"peft_type": "IA3"}, "is a PEFT adapter of the kind IA3, which is not supported"),
        ({"init_lora_weights": "pissa_niter_4"}, "was trained from another base .init_lora_weights='pissa_niter_4'."),
        ({"use_qalora": True}, "was trained with use_qalora, which is not supported"),
        (
            {"lora_alpha": 10**400},
            "adapter_config.json is no configuration of PEFT: it has a whole number of 401 digits; valid: up to 19",
        ),
        (
            {"lora_alpha": float("inf")},
            "adapter_config.json is no configuration of PEFT: it has Infinity, which is no JSON",
        ),
        ({"lora_alpha": "much"}, "adapter_config.json is no configuration of PEFT: could not convert string to float"),
        (
            {"alpha_pattern": {"to_q": 10**400}},
            "adapter_config.json is no configuration of PEFT: it has a whole number of 401 digits",
        ),
        ({"alpha_pattern": ["to_q"]}, "adapter_config.json is no configuration of PEFT: "),
        ({"alpha_pattern": {"to_(q": 1}}, "the pattern 'to_.q' is no regular expression"),
        ({"alpha_pattern": {"(a+)+$": 1}}, "the pattern .* is too intricate"),
        ({"alpha_pattern": {".*.*.*.*.*x": 1}}, "the pattern .* is too intricate"),
        ({"alpha_pattern": {"(a|a)" * 30: 1}}, "the pattern .* is too intricate"),
        ({"alpha_pattern": {"a?" * 40 + "a" * 40: 1}}, "the pattern .* is too intricate"),
        ({"alpha_pattern": {"a{1,9}": 1}}, "the pattern .* is too intricate"),
        ({"alpha_pattern": {str(n): 1 for n in range(5000)}}, "5000 patterns, 4096 at most"),
    ],
)
def test_settings_that_are_not_read_are_one_line(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    path = folder_with(tmp_path / "adapter", **settings)
    with pytest.raises(InputError, match=message) as caught:
        merge([Lora(path=path)], {"unet": state_of(Net())})
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"r": ' + "1" * 5000 + "}", "[]", "", "null"])
def test_damaged_settings_are_one_line(tmp_path: Path, text: str) -> None:
    path = folder_with(tmp_path / "adapter")
    (path / "adapter_config.json").write_text(text)
    with pytest.raises(
        InputError, match=r"adapter_config\.json is no configuration of PEFT: .*; take the .* own$"
    ) as caught:
        merge([Lora(path=path)], {"unet": state_of(Net())})
    assert "\n" not in str(caught.value)
    state = {"unet.conv_in.lora_A.weight": np.ones((2, 4, 3, 3), np.float32)}
    save_file(state, tmp_path / "header.safetensors", {"lora_adapter_metadata": text or "{"})
    if text not in ("[]", "null"):  # empty is none
        with pytest.raises(InputError, match=r"header\.safetensors in its header's .* cannot be used: .*; take the "):
            merge([Lora(path=tmp_path / "header.safetensors")], {"unet": state_of(Net())})


def test_only_what_peft_says_it_saved_takes_the_place_of_weights(tmp_path: Path) -> None:
    before, _ = adapted(peft.LoraConfig(**LORA, modules_to_save=["norm"]), tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"modules_to_save": None}))
    with pytest.raises(InputError, match="does not fit this model; 1 keys match nothing: norm; use one"):
        merge([Lora(path=tmp_path)], {"unet": before})
