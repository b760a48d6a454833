"""LoRAs of a call: by file, folder and name, in a prompt; the model's own bytes come back, and jobs stay apart."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from calotype.runtime.adapters import lora as merging
from calotype.runtime.adapters.lora import Lora
from calotype.runtime.adapters.named import NamedLora, asked, parse
from calotype.runtime.errors import InputError
from calotype.runtime.pictures.embedded import read_parameters
from calotype.runtime.pipeline import Pipeline
from calotype.runtime.preparation import Drawing
from calotype.runtime.recall import recall
from calotype.runtime.request import Request
from calotype.runtime.sessions.session import Session
from tests.runtime.command_line import calotype
from tests.runtime.lora_files import TEXT, write_lora
from tests.runtime.lora_switching import SETS, SHORT, TALBOT, drawn, write_loras


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_loras(tmp_path_factory.mktemp("loras"))


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Iterator[Pipeline]:
    with Pipeline.load(TALBOT, "cpu", lora_folder=folder, prompt_loras=True) as opened:
        yield opened


def test_a_file_a_folder_and_a_name_are_the_same_and_nothing_stays(pipeline: Pipeline, folder: Path) -> None:
    plain = drawn(pipeline, None)
    assert pipeline.lora_names == ("lines", "pad", "style", "words")
    for name, path in (("style", folder / "style.safetensors"), ("pad", folder / "pad")):
        by_name = drawn(pipeline, [(name, 0.8)])
        assert drawn(pipeline, [(str(path), 0.8)]) == drawn(pipeline, [Lora(path=path, scale=0.8)]) == by_name != plain
        assert drawn(pipeline, [(name, 0.4)]) != by_name
        assert drawn(pipeline, []) == drawn(pipeline, None) == drawn(pipeline, [(name, 0.0)]) == plain
    both = drawn(pipeline, ["style", ("lines", 0.5)])
    assert len({both, plain, drawn(pipeline, ["style"]), drawn(pipeline, [("lines", 0.5)])}) == 4


def test_a_call_equals_a_pipeline_that_was_loaded_with_them(pipeline: Pipeline, folder: Path) -> None:
    once = drawn(pipeline, [("style", 0.8), "words"])
    with Pipeline.load(TALBOT, "cpu", loras=[(folder / "style.safetensors", 0.8), folder / "words.safetensors"]) as own:
        assert drawn(own, None) == once
        own.set_loras([])
        assert drawn(own, None) == drawn(pipeline, None) != once
        assert own.lora_names == ()


def test_a_prompt_names_them_where_that_is_turned_on(pipeline: Pipeline, folder: Path) -> None:
    wanted = drawn(pipeline, [("style", 0.8), ("lines", 1.0)], "red  apple")
    assert drawn(pipeline, None, "red <lora:style:0.8> apple<lyco:lines>") == wanted
    assert drawn(pipeline, [("style", 0.8)], "red <lora:lines:1> apple") == wanted
    with Pipeline.load(TALBOT, "cpu", lora_folder=folder) as words:
        assert drawn(words, None, "red <lora:style:0.8> apple") not in (wanted, drawn(words, None, "red  apple"))
    for prompt in ("<lora:style:0.5:0.7>", "<lora::1>", "<lora:style:nan>", "<lora:style:1e999>", "<lora:style:much>"):
        with pytest.raises(InputError, match=r"is no name and one scale; write <lora:NAME:0\.8>"):
            drawn(pipeline, None, f"red {prompt}")
    with pytest.raises(InputError, match=r"there is no LoRA '\.\./style'; valid: lines, pad, style, words; a file is"):
        drawn(pipeline, None, "red <lora:../style:1>")


def test_a_stranger_gives_names_and_no_files(folder: Path) -> None:
    request = Request.from_json({"prompt": "a", "loras": [{"name": "style", "scale": 0.8}, {"name": "lines"}]})
    assert request.loras == (NamedLora(name="style", scale=0.8), NamedLora(name="lines"))
    assert Request.from_json(json.loads(json.dumps(request.to_json()))) == request
    value: Any
    for value, message in (
        ({"file": str(folder / "style.safetensors")}, "loras names a file, and files of a request are not opened here"),
        ("style", "loras is no list; give"),
        ({"name": "a", "file": "b"}, 'loras has .*; give a "name" or a "file"'),
        ({"scale": 1}, 'loras has .*; give a "name" or a "file"'),
        ({"name": "a", "strength": 1}, 'loras has .*; give a "name" or a "file"'),
        ({"name": 5}, "a LoRA's name=5 is no name"),
        ({"name": "a", "scale": "much"}, "a LoRA's scale='much' is not a finite number"),
    ):
        with pytest.raises(InputError, match=message):
            Request.from_json({"prompt": "a", "loras": [value]})


def test_what_a_text_means(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert asked("style") == NamedLora(name="style")
    assert asked(("style.safetensors", 2)) == Lora(path=Path("style.safetensors"), scale=2.0)
    assert asked("pad") == Lora(path=Path("pad"))
    assert asked(("a/b", 0.5)) == Lora(path=Path("a/b"), scale=0.5)
    assert parse("style:0.5") == NamedLora(name="style", scale=0.5)
    assert parse("pad:0.5") == Lora(path=Path("pad"), scale=0.5)
    for value in (5, None, ("a", 1, 2), (1, "a"), ["a", "much"], {"a": 1}, ("a", float("nan"))):
        with pytest.raises(InputError):
            Request(prompt="a", loras=[value])
    with pytest.raises(InputError, match="loras='style' is no list of LoRAs"):
        Request(prompt="a", loras="style")


def test_bad_folders_and_names_are_one_line(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(InputError, match="is no folder; name one that holds LoRAs"):
        Pipeline.load(TALBOT, "cpu", lora_folder=tmp_path / "none")
    (tmp_path / "pad").symlink_to(folder / "pad")
    write_lora(tmp_path / "pad.safetensors", 1)
    with pytest.raises(InputError, match=r"has .pad. and .pad\.safetensors., both by the name .pad."):
        Pipeline.load(TALBOT, "cpu", lora_folder=tmp_path)
    with Pipeline.load(TALBOT, "cpu") as pipeline:
        with pytest.raises(InputError, match="there is no LoRA 'x'; valid: none, since no folder of LoRAs was named"):
            drawn(pipeline, ["x"])
        with pytest.raises(InputError, match=r"x\.safetensors does not exist"):
            drawn(pipeline, ["x.safetensors"])
        with pytest.raises(InputError, match="lora_memory=-1 is less than 0"):
            Pipeline.load(TALBOT, "cpu", lora_memory=-1)


def test_a_picture_names_them_and_is_drawn_again(pipeline: Pipeline, folder: Path, tmp_path: Path) -> None:
    picture = pipeline("red <lora:style:0.8>", loras=[("pad", -0.3)], **SHORT).pictures[0]
    text = read_parameters(picture.save(tmp_path / "a.png"))
    assert text.startswith("red \nSteps: 2")
    assert 'Lora: "pad:-0.3 ' in text
    assert " style.safetensors:0.8 " in text
    found = recall(text, [folder])
    with Pipeline.load(found.model, "cpu") as other:
        again = next(iter(other.draw([found.request])))[1]
    assert again.image.tobytes() == picture.image.tobytes()


def test_the_command_line_goes_the_same_way(pipeline: Pipeline, folder: Path, tmp_path: Path) -> None:
    size = ("--steps", "2", "--seed", "3", "--cfg-scale", "1", "-W", "64", "-H", "64", "--backend", "cpu")
    ways = ("--lora-folder", str(folder), "--prompt-loras", "--lora", "lines:0.5", "-o", "a.png")
    result = calotype("generate", "red <lora:style:0.8>", *ways, *size, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    wanted = drawn(pipeline, [("lines", 0.5), ("style", 0.8)], "red ")
    assert Image.open(tmp_path / "a.png").tobytes() == wanted
    result = calotype("generate", "--again", "a.png", "--folder", str(folder), "-o", "b.png", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert Image.open(tmp_path / "b.png").tobytes() == wanted
    result = calotype("generate", "red", "--lora", "line", "--lora-folder", str(folder), cwd=tmp_path)
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
    assert "there is no LoRA 'line'; valid: lines, pad, style, words" in result.stderr


def test_what_is_used_again_is_still_open_within_the_memory_that_is_given(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    original = merging.merged

    def counted(loras: Sequence[Lora], *rest: Any) -> Any:
        made.append(" ".join(lora.path.stem for lora in loras))
        return original(loras, *rest)

    monkeypatch.setattr("calotype.runtime.merged_weights.merged", counted)
    for memory, again in ((1 << 30, []), (0, ["style", "lines"])):
        with Pipeline.load(TALBOT, "cpu", lora_folder=folder, lora_memory=memory) as pipeline:
            first = [drawn(pipeline, loras) for loras in ([], ["style"], ["lines"])]
            made.clear()
            assert [drawn(pipeline, loras) for loras in ([], ["style"], ["lines"])] == first
            assert made == again
            in_use = {key for key in pipeline.networks.sessions if key.weights or key.network == TEXT}
            held = sum(pipeline.networks.sessions[key].own_bytes for key in in_use)
            assert (pipeline.networks.kept_bytes <= held) == (memory == 0)


def test_a_file_that_was_replaced_is_read_anew(pipeline: Pipeline, tmp_path: Path) -> None:
    path = write_lora(tmp_path / "a.safetensors", 7)
    one = drawn(pipeline, [path])
    write_lora(path, 8)
    other = drawn(pipeline, [path])
    assert other != one
    write_lora(path, 7)
    assert drawn(pipeline, [path]) == one
    job = pipeline.prepare(Request(prompt="red", loras=[path], **SHORT))
    with pipeline._lock:
        while len(pipeline.networks.sessions):
            pipeline.networks.sessions.popitem()[1].close()
    write_lora(path, 8)
    with pytest.raises(
        InputError, match=r"a\.safetensors has changed since the picture was asked for; ask for it again"
    ):
        pipeline.step([job])


REQUESTS = st.builds(
    Request,
    prompt=st.sampled_from(["red apple", "dragon"]),
    negative_prompt=st.sampled_from(["", "blue"]),
    seed=st.integers(0, 1),
    num_inference_steps=st.integers(2, 3),
    scheduler=st.sampled_from(["euler", "heun"]),
    guidance_scale=st.sampled_from([1.0, 4.0]),
    loras=st.sampled_from(SETS),
    height=st.just(64),
    width=st.just(64),
)


def check_apart(pipeline: Pipeline, requests: Sequence[Request], data: st.DataObject) -> None:
    """Every job in one step with others comes out as it does alone, and no run has jobs of two sets."""

    def alone(request: Request) -> bytes:
        job = pipeline.prepare(request)
        while not job.done:
            pipeline.step([job])
        return bytes(pipeline.finish(job).image.tobytes())

    running: list[Drawing] = [pipeline.prepare(request) for request in requests]
    for request, job in zip(requests, running, strict=True):
        named = [lora for lora in request.loras or () if isinstance(lora, NamedLora)]
        changing = any(lora.name != "words" for lora in named)  # the UNet, that is
        weights = [(lora.path.stem, lora.scale) for lora in job.key.session.weights]  # type: ignore[attr-defined]
        assert weights == ([(lora.name, lora.scale) for lora in named] if changing else [])
    while any(not job.done for job in running):
        waiting = [job for job in running if not job.done]
        moved = data.draw(st.lists(st.sampled_from(waiting), min_size=1, unique_by=id))
        for job in moved:
            shared = pipeline._denoiser.pick([job, *(other for other in waiting if other is not job)])
            assert {other.key.session.weights for other in shared} == {job.key.session.weights}
        pipeline.step(moved)
    for request, job in zip(requests, running, strict=True):
        assert pipeline.finish(job).image.tobytes() == alone(request), request


@given(requests=st.lists(REQUESTS, min_size=2, max_size=4), data=st.data())
@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
def test_jobs_of_other_loras_stay_apart(pipeline: Pipeline, requests: list[Request], data: st.DataObject) -> None:
    check_apart(pipeline, requests, data)


@pytest.mark.slow
@given(requests=st.lists(REQUESTS, min_size=2, max_size=6), data=st.data())
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
def test_jobs_of_other_loras_stay_apart_at_length(
    pipeline: Pipeline, requests: list[Request], data: st.DataObject
) -> None:
    check_apart(pipeline, requests, data)


def test_jobs_that_a_lora_of_words_alone_tells_apart_share_a_run(pipeline: Pipeline) -> None:
    jobs = [pipeline.prepare(Request(prompt="red", loras=loras, **SHORT)) for loras in ([], ["words"], ["lines"])]
    assert pipeline._denoiser.pick(jobs) == jobs[:2]
    assert not np.array_equal(
        jobs[0].conditional["encoder_hidden_states"], jobs[1].conditional["encoder_hidden_states"]
    )
    assert np.array_equal(jobs[0].conditional["encoder_hidden_states"], jobs[2].conditional["encoder_hidden_states"])
    assert all(pipeline.is_open(job) for job in jobs)


def test_networks_that_take_turns_keep_the_set_in_use_alone(pipeline: Pipeline, folder: Path) -> None:
    wanted = [drawn(pipeline, loras) for loras in (["style"], [], ["lines"])]
    with Pipeline.load(TALBOT, "cpu", lora_folder=folder, low_memory=True) as turns:
        for _ in range(2):
            assert [drawn(turns, loras) for loras in (["style"], [], ["lines"])] == wanted
        changed = {key.weights for key in turns.networks.sessions if key.weights}
        assert len(changed) == 1
        assert turns.networks.kept_bytes > 0


def test_own_bytes_of_a_session_are_said(pipeline: Pipeline) -> None:
    session: Session = pipeline.networks.encoder(TEXT)
    assert session.own_bytes > 1 << 20
