"""The exporter: bundles from a checkpoint that diffusers wrote."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from safetensors.torch import load_file, save_file

from calotype.export.bundle import export_checkpoint
from calotype.export.partial import PartialBundle
from calotype.export.sources import load_checkpoint
from calotype.export.verification import verify_against
from calotype.runtime.bundle.folder import Bundle
from calotype.runtime.cli.main import run
from calotype.runtime.errors import BundleError, CheckpointError, ExportError, InputError, UnsupportedArchitectureError


@pytest.fixture(scope="module")
def taesd(taesd_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its bundle."""
    bundle = tmp_path_factory.mktemp("bundles") / "taesd"
    export_checkpoint(taesd_checkpoint, bundle)
    return bundle


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Killed(BaseException):
    """Ends an export where a test wants it to."""


def test_every_graph_equals_its_module_to_1e4(tiny_bundle: Path) -> None:
    parity = Bundle.open(tiny_bundle).manifest.parity
    unets = {"unet", "unet_deep", "unet_shallow", "unet_control", "unet_image_prompt"}
    assert set(parity) == {"text_encoder", *unets, "vae_decoder", "vae_encoder"}
    assert all(0 < report["float32"]["max_relative"] <= 1e-4 for report in parity.values())
    assert all(0.9995 <= report["float16"]["min_cosine"] < 1 for report in parity.values())
    assert all(report["float16"]["largest_in_float16"] < 65504 / 8 for report in parity.values())
    # The sines of the timestep, and nothing else.
    assert {network: len(report["float16"]["float32_islands"]) for network, report in parity.items()} == {
        "text_encoder": 0,
        "unet": 5,
        "unet_deep": 5,
        "unet_shallow": 5,
        "unet_control": 5,
        "unet_image_prompt": 5,
        "vae_decoder": 0,
        "vae_encoder": 0,
    }


def test_weights_are_kept_once(tiny_bundle: Path) -> None:
    for graph in tiny_bundle.glob("*.onnx"):
        model = onnx.load(graph, load_external_data=False)
        inside = sum(len(tensor.raw_data) for tensor in model.graph.initializer if not tensor.external_data)
        assert inside < 10_000
        outside = [tensor for tensor in model.graph.initializer if tensor.external_data]
        assert outside
        assert all(not tensor.name.startswith("model.") for tensor in outside)
        assert graph.stat().st_size < 10_000_000
        assert b".py" not in graph.read_bytes()  # no stack traces of the machine that exported it


def test_attention_and_norms_are_single_nodes(tiny_bundle: Path) -> None:
    model = onnx.load(tiny_bundle / "unet.fp32.onnx", load_external_data=False)
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("Attention") == 8
    assert kinds.count("GroupNormalization") > 0
    assert "InstanceNormalization" not in kinds
    assert "Softmax" not in kinds


def test_an_autoencoder_alone_is_a_bundle_too(taesd: Path) -> None:
    manifest = Bundle.open(taesd).manifest
    assert (manifest.family, set(manifest.networks)) == ("vae", {"vae_decoder", "vae_encoder"})
    assert (manifest.vae.scaling_factor, manifest.vae.downscale, manifest.max_clip_skip) == (1.0, 2, 0)
    assert [path.name for path in taesd.parent.iterdir()] == ["taesd"]


def test_float32_weights_have_one_graph(taesd_checkpoint: Path, tmp_path: Path) -> None:
    steps: list[tuple[str, str, float]] = []
    manifest = export_checkpoint(
        taesd_checkpoint, tmp_path / "taesd", precision="fp32", progress=lambda *step: steps.append(step)
    )
    assert all(set(spec.graphs) == {"float32"} for spec in manifest.networks.values())
    size = sum(
        tensor.numel() for tensor in load_file(taesd_checkpoint / "diffusion_pytorch_model.safetensors").values()
    )
    assert manifest.files["vae.safetensors"].size == pytest.approx(4 * size, abs=10_000)
    assert [part for _, _, part in steps] == sorted({part for _, _, part in steps})
    assert (steps[0], steps[-1]) == (("vae", "writing weights", 0.0), ("vae", "done", 1.0))


def test_an_unknown_precision(taesd_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="precision 'int8' is not known; valid: fp16, fp32"):
        export_checkpoint(taesd_checkpoint, tmp_path / "other", precision="int8")


def test_an_interrupted_export_goes_on_after_what_it_finished(tiny_checkpoint: Path, tmp_path: Path) -> None:
    def run(seen: list[str]) -> None:
        def progress(component: str, what: str, _: float) -> None:
            seen.append(f"{component} {what}")
            if seen[-1] == "unet tracing unet_deep":
                raise Killed

        with pytest.raises(Killed):
            export_checkpoint(tiny_checkpoint, tmp_path / "bundle", progress=progress)

    first: list[str] = []
    run(first)
    assert "text_encoder tracing text_encoder" in first
    assert [path.name for path in tmp_path.iterdir()] == [".bundle.partial"]
    with pytest.raises(BundleError, match=r"it has no calotype\.json"):
        Bundle.open(tmp_path / ".bundle.partial")
    second: list[str] = []
    run(second)
    assert second == ["text_encoder done", "unet writing weights", "unet tracing unet_deep"]
    # A file that is not what it was, as after a power cut, is made again.
    graph = tmp_path / ".bundle.partial" / "text_encoder.fp32.onnx"
    graph.write_bytes(graph.read_bytes()[:-1])
    third: list[str] = []
    run(third)
    assert third == first


@pytest.mark.slow
def test_an_export_killed_half_way_ends_as_if_it_had_not_been(
    tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "calotype.runtime", "export", str(tiny_checkpoint), str(tmp_path / "tiny")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line == "unet: tracing unet\n":
                process.kill()
    assert not (tmp_path / "tiny").exists()
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "text_encoder: tracing" not in again.stderr
    assert files(tmp_path / "tiny") == files(tiny_bundle)


def test_force_replaces_the_bundle_and_a_failure_leaves_it(
    taesd_checkpoint: Path, taesd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = tmp_path / "taesd"
    shutil.copytree(taesd, bundle)
    before = files(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr("calotype.runtime.bundle.parity.MAX_RELATIVE", 0.0)
        message = r"vae_decoder\.fp32\.onnx does not compute .*: it is off by .* 0e\+00 is allowed, in 'image'"
        with pytest.raises(ExportError, match=message):
            export_checkpoint(taesd_checkpoint, bundle, force=True)
    assert files(tmp_path) == before
    export_checkpoint(taesd_checkpoint, bundle, precision="fp32", force=True)
    assert "vae_decoder.fp16.onnx" not in files(bundle)
    assert [path.name for path in tmp_path.iterdir()] == ["taesd"]


def test_a_kill_between_the_two_renames_loses_no_bundle(tmp_path: Path) -> None:
    old = tmp_path / ".taesd.replaced"
    old.mkdir()
    (old / "calotype.json").write_text("{}")
    with PartialBundle(tmp_path / "taesd"):
        assert (tmp_path / "taesd" / "calotype.json").read_text() == "{}"
        assert not old.exists()


def test_a_full_disk(taesd_checkpoint: Path, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(ExportError, match=r"cannot be written: (File too large|.*Error)"):
            export_checkpoint(taesd_checkpoint, tmp_path / "taesd", precision="fp32")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_two_exports_of_one_bundle(taesd_checkpoint: Path, tmp_path: Path) -> None:
    with (
        PartialBundle(tmp_path / "taesd"),
        pytest.raises(ExportError, match=r"another export is writing .*taesd; wait for it, or choose another folder"),
    ):
        export_checkpoint(taesd_checkpoint, tmp_path / "taesd")


def test_verify_against_the_source(taesd_checkpoint: Path, taesd: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(taesd)
    found = dict(verify_against(bundle, str(taesd_checkpoint)))
    assert set(found) == {
        f"{network}, {precision} against PyTorch"
        for network in ("vae_decoder", "vae_encoder")
        for precision in ("float32", "float16")
    }
    recorded = bundle.manifest.parity["vae_decoder"]["float16"]["max_relative"]
    assert found["vae_decoder, float16 against PyTorch"].max_relative == recorded
    with pytest.raises(
        ExportError, match=r"does not have the networks of .*; give the checkpoint it was exported from"
    ):
        list(verify_against(bundle, str(tiny_checkpoint)))
    other = tmp_path / "other"
    shutil.copytree(taesd_checkpoint, other)
    state = load_file(other / "diffusion_pytorch_model.safetensors")
    state["decoder.layers.0.weight"] *= 2
    save_file(state, other / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ExportError, match=r"vae_decoder\.fp32\.onnx .* is off by"):
        list(verify_against(bundle, str(other)))


def test_the_command_hands_the_variant_on(
    taesd_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["export", str(taesd_checkpoint), str(tmp_path / "taesd"), "--variant", "bf16"]) == 2
    assert "has no weights of the variant 'bf16'; it has none" in capsys.readouterr().err


def test_a_bundle_in_the_way_is_refused(tiny_checkpoint: Path, tiny_bundle: Path) -> None:
    before = (tiny_bundle / "calotype.json").read_bytes()
    with pytest.raises(ExportError, match="--force"):
        export_checkpoint(tiny_checkpoint, tiny_bundle)
    assert (tiny_bundle / "calotype.json").read_bytes() == before


def test_truncated_weights(tiny_checkpoint: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_checkpoint, broken)
    weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        export_checkpoint(broken, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == [broken]


def test_a_missing_key_is_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_checkpoint, broken)
    weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    del state["conv_in.bias"]
    save_file(state, weights)
    with pytest.raises(CheckpointError, match=r"1 missing: conv_in\.bias"):
        export_checkpoint(broken, tmp_path / "bundle")


def test_a_shard_index_that_points_outside(tiny_checkpoint: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_checkpoint, broken)
    index = broken / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    for text, message in (
        ("{", r"index\.json cannot be read as JSON"),
        ("{}", "not an index"),
        ('{"weight_map": {"conv_in.bias": "../../x.safetensors"}}', "outside its folder"),
    ):
        index.write_text(text)
        with pytest.raises(CheckpointError, match=message):
            export_checkpoint(broken, tmp_path / "bundle")


def test_the_padding_token_of_the_special_tokens_map_wins(tiny_checkpoint: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_checkpoint, source)
    (source / "tokenizer" / "special_tokens_map.json").write_text('{"pad_token": {"content": "!"}}')
    assert load_checkpoint(source).tokenizers["tokenizer"].pad_token == "!"


def test_another_pipeline_is_refused_by_name(tiny_checkpoint: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_checkpoint, other)
    index = json.loads((other / "model_index.json").read_text())
    (other / "model_index.json").write_text(json.dumps(index | {"_class_name": "FluxPipeline"}))
    with pytest.raises(UnsupportedArchitectureError, match="FluxPipeline"):
        export_checkpoint(other, tmp_path / "bundle")
