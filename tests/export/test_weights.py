"""State dicts on their way into modules and out to files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from calotype.export.weight_files import read_component, shards, weight_names
from calotype.export.weights import load_module, locate, renamed, to_float32, write_weights
from calotype.runtime.errors import CheckpointError, ExportError


class Two(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.second = nn.ModuleList([nn.Linear(width, 1, bias=False)])


STATE = {"first.weight": torch.ones(3, 3), "first.bias": torch.arange(3.0), "second.0.weight": torch.ones(1, 3)}


def test_all_that_does_not_match_is_listed() -> None:
    state = {name: tensor for name, tensor in STATE.items() if name != "first.bias"}
    state |= {"first.scale": torch.ones(1), "second.0.weight": torch.ones(2, 3), "position_ids": torch.ones(1)}
    with pytest.raises(
        CheckpointError,
        match=r"^the toy's weights do not match its configuration: 1 missing: first\.bias; 1 unexpected: first\.scale; "
        r"1 mis-shaped: second\.0\.weight \(2, 3\) instead of \(1, 3\); it is of another kind, or lost tensors when it "
        r"was converted: take the publisher's own$",
    ):
        load_module(Two, 3, state, "toy")


def test_of_many_names_the_first_are_listed() -> None:
    state = STATE | {f"more.{number}": torch.ones(1) for number in range(10)}
    with pytest.raises(CheckpointError, match=r"10 unexpected: more\.0, .*, more\.7 and 2 more; it is of another kind"):
        load_module(Two, 3, state, "toy")


def test_the_longest_beginning_is_renamed() -> None:
    table = {"a": "x", "a.b": "y", "a.b.c.d": "z"}
    names = {"a.weight": "x.weight", "a.b.c": "y.c", "a.b.c.d": "z", "ab.c": "ab.c", "b.a": "b.a"}
    assert {name: renamed(name, table) for name in names} == names


def test_another_layout_is_read_through_its_table() -> None:
    table = {"first": "one", "second.0": "2"}
    original = {renamed(name, table): tensor for name, tensor in STATE.items()}
    assert original.keys() == {"one.weight", "one.bias", "2.weight"}
    module = load_module(Two, 3, original, "toy", table)
    assert all(torch.equal(tensor, STATE[name]) for name, tensor in module.state_dict().items())
    with pytest.raises(CheckpointError, match=r"1 missing: 2\.weight; 1 unexpected: second\.0\.weight"):
        load_module(Two, 3, {renamed(name, {"first": "one"}): STATE[name] for name in STATE}, "toy", table)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_precision_are_computed_in_float32(dtype: torch.dtype) -> None:
    module = load_module(Two, 3, {name: tensor.to(dtype) for name, tensor in STATE.items()}, "toy")
    assert not module.training
    assert {tensor.dtype for tensor in module.state_dict().values()} == {dtype}  # nothing is copied before its turn
    to_float32(module)
    for name, tensor in module.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, STATE[name])


def test_every_tensor_lies_where_it_is_located(tmp_path: Path) -> None:
    module = load_module(Two, 3, STATE, "toy")
    write_weights(module, tmp_path / "toy.safetensors", torch.float16)
    content = (tmp_path / "toy.safetensors").read_bytes()
    places = locate(tmp_path / "toy.safetensors")
    assert places.keys() == STATE.keys()
    for name, place in places.items():
        stored = np.frombuffer(content[place.offset : place.offset + place.length], np.float16)
        np.testing.assert_array_equal(stored, STATE[name].half().flatten().numpy())


def test_writing_rounds_the_module_too(tmp_path: Path) -> None:
    module = load_module(Two, 3, STATE | {"first.bias": torch.full((3,), 0.1)}, "toy")
    write_weights(module, tmp_path / "toy.safetensors", torch.float16)
    assert torch.equal(module.first.bias, torch.full((3,), 0.1).half().float())


def test_what_float16_cannot_hold_is_named(tmp_path: Path) -> None:
    module = load_module(Two, 3, STATE | {"first.bias": torch.full((3,), 1e5)}, "toy")
    with pytest.raises(CheckpointError, match=r"first\.bias has values that torch\.float16 cannot hold; .*fp32"):
        write_weights(module, tmp_path / "toy.safetensors", torch.float16)


def test_what_is_not_finite_is_not_blamed_on_the_precision(tmp_path: Path) -> None:
    for value in (float("nan"), float("inf")):
        module = load_module(Two, 3, STATE | {"first.bias": torch.full((3,), value)}, "toy")
        with pytest.raises(
            CheckpointError, match=r"first\.bias has values that are not finite; the checkpoint is broken"
        ):
            write_weights(module, tmp_path / "toy.safetensors", torch.float32)


def test_tensors_of_any_make_become_the_module_s_own(tmp_path: Path) -> None:
    """Files hold tensors of mixed precision, turned, repeated, and several over the same numbers."""
    shared = torch.arange(9.0).reshape(3, 3)
    state = {"first.weight": shared.T, "first.bias": shared[0].bfloat16(), "second.0.weight": shared[:1]}
    module = load_module(Two, 3, state, "toy")
    to_float32(module)
    write_weights(module, tmp_path / "toy.safetensors", torch.float32)
    written = load_file(tmp_path / "toy.safetensors")
    assert all(torch.equal(written[name], tensor.float()) for name, tensor in state.items())
    module.first.weight.zero_()
    assert torch.equal(module.second[0].weight, torch.tensor([[0.0, 1, 2]])) and float(shared.sum()) == 36


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"toy\.safetensors cannot be written: .*; make room or choose"):
        write_weights(load_module(Two, 3, STATE, "toy"), tmp_path / "nowhere" / "toy.safetensors", torch.float32)


def test_the_source_stays_as_it_is(tmp_path: Path) -> None:
    """Its tensors are mapped into memory, and rounding writes into the module's."""
    save_file(STATE | {"first.bias": torch.full((3,), 0.1)}, tmp_path / "model.safetensors")
    before = (tmp_path / "model.safetensors").read_bytes()
    module = load_module(Two, 3, read_component(tmp_path, "model"), "toy")
    write_weights(module, tmp_path / "half.safetensors", torch.float16)
    assert (tmp_path / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("best", range(4))
def test_the_best_file_of_a_component_is_read(tmp_path: Path, best: int) -> None:
    for place, name in enumerate(weight_names("model")):
        if place >= best:
            file = f"shard-{place}.safetensors" if name.endswith(".json") else name
            save_file({"place": torch.tensor(float(place))}, tmp_path / file)
            if name.endswith(".json"):
                (tmp_path / name).write_text(json.dumps({"weight_map": {"place": file}}))
    assert read_component(tmp_path, "model")["place"] == best


def test_an_index_that_is_none(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    for text, message in (
        ("{", "cannot be read as JSON"),
        ('{"weight_map": []}', "is not an index of weights"),
        ('{"weight_map": {"a": "../x.safetensors"}}', r"names files outside its folder: \.\./x\.safetensors; do not"),
    ):
        index.write_text(text)
        with pytest.raises(CheckpointError, match=message):
            shards(index)


def test_a_file_cut_short_at_any_byte_is_one_line(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    for length in (0, 4, 8, 50, len(whole) - 1):
        (tmp_path / "model.safetensors").write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"cannot be read|is empty; download|is of an unknown kind") as caught:
            read_component(tmp_path, "model")
        assert "\n" not in str(caught.value)
    (tmp_path / "model.safetensors").write_bytes(whole)
    assert load_file(tmp_path / "model.safetensors").keys() == read_component(tmp_path, "model").keys()
