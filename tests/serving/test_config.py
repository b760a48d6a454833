"""``serve.toml`` and options: what is wrong is one line that names it."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from calotype.runtime.bundle.folder import BUNDLED
from calotype.runtime.bundle.manifest import Manifest
from calotype.runtime.errors import BackendError, BundleError, CalotypeError, InputError
from calotype.serving.config import ModelConfig, ServeConfig, from_table, model_names
from calotype.serving.http.keys import read_keys
from calotype.serving.http.limits import Limits

DOCS = Path(__file__).parent.parent.parent / "docs"

FULL = """
port = 0
devices = [1, 0]
max-queue = 3
max_seconds = 20

[models.photo]
bundle = "talbot"
fast = true
warm = ["64x96"]
loras = { style = "loras/style.safetensors" }

[models.talbot]
backend = "cpu"

[limits]
steps = 50
"""


def read(tmp_path: Path, text: str, models: dict[str, str] | None = None, **options: Any) -> ServeConfig:
    path = tmp_path / "serve.toml"
    path.write_text(text)
    return ServeConfig.read(path, models or {}, options)


def test_a_file_says_everything_and_the_command_line_wins(tmp_path: Path) -> None:
    lora = tmp_path / "style.safetensors"
    save_file({"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": np.zeros((1, 1), np.float32)}, lora)
    config = read(tmp_path, FULL.replace("loras/style.safetensors", str(lora)), max_queue=5, host=None)
    assert (config.port, config.devices, config.max_queue, config.max_seconds) == (0, (1, 0), 5, 20.0)
    assert list(config.models) == ["photo", "talbot"]
    assert config.models["talbot"].bundle == "talbot"
    served = config.served()["photo"]
    assert served.open.sizes == ((64, 96),)
    assert served.open.fast
    assert served.loras == {"style": lora}
    assert config.limits.steps == 50
    assert config.bounds.max_queue == 5


def test_models_of_the_command_line_have_the_settings_of_their_tables(tmp_path: Path) -> None:
    config = read(tmp_path, FULL, {"photo": "models/other"})
    assert list(config.models) == ["photo"]
    assert (config.models["photo"].bundle, config.models["photo"].fast) == ("models/other", True)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prot = 1", "unknown settings: prot; valid: admin_key_file, api_key_file"),
        ("port = '80'", "port in .*serve.toml is '80'; give a whole number"),
        ("port = true", "give a whole number"),
        ("port = 70000", "port=70000 is out of range; give 0 to 65535"),
        ("max_running = 0", "max_running=0 is out of range; give 1 to 65536"),
        ("devices = 1", "devices in .* is 1, no list"),
        ("devices = [0, 0]", "different GPUs"),
        ("devices = [0]\nworkers = 2", "not both"),
        ("host = '0.0.0.0'", "there are no keys; give --api-key-file"),
        ("host = 'example.org'", "there are no keys"),
        ("[models.a]\nwarm = ['12']", "the size '12' is none; write WIDTHxHEIGHT"),
        ("[models.a]\nwarm = ['0x0']", "the size '0x0' is none"),
        ("[models.a]\nwarm = ['64x99999']", "pixels from 1 to 16384"),
        ("[models.a]\nwarm = ['64x٣']", "the size '64x٣' is none"),
        ("[models.'']\nbundle = 'talbot'", "a model has the name ''"),
        ("hang_seconds = 0", "hang_seconds=0.0 is out of range; give 0.1 to 86400"),
        ("stop_seconds = inf", "stop_seconds=inf is out of range"),
        ("threads = 100000000", "threads=100000000 is out of range"),
        ("[models.a]\nlora = 1", r"\[models.a\] of .* has unknown settings: lora; valid: backend, bundle"),
        ("[limits]\nstep = 3", r"\[limits\] of .* has unknown settings: step; valid: bodies_bytes"),
        ("[limits]\nsteps = 0", "the limit steps=0"),
        ("models = 3", "models that are no tables"),
        ("=", "not a file of settings in TOML"),
        ("", "no model to serve"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        read(tmp_path, text, {} if "models" in text or not text else {"talbot": "talbot"})


def test_a_model_can_be_pinned(tmp_path: Path) -> None:
    pin = Manifest.read(BUNDLED / "talbot").sha256
    served = read(tmp_path, f"[models.talbot]\nsha256 = '{pin.upper()}'").served()["talbot"]
    assert served.open.sha256 == pin.upper()
    with pytest.raises(BundleError, match=f"is not the pinned bundle: its manifest's sha256 is {pin}, {'0' * 64} exp"):
        read(tmp_path, f"[models.talbot]\nsha256 = '{'0' * 64}'").served()
    for wrong in (pin[:63], f"sha1:{pin}", f"{pin}\\n"):
        with pytest.raises(InputError, match="is no SHA-256; give the 64 digits that calotype info shows"):
            read(tmp_path, f'[models.talbot]\nsha256 = "{wrong}"').served()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("warm = ['65x64']", "a cannot be warmed at 65x64: width=65"),
        ("loras = { ink = 'nix.safetensors' }", "nix.safetensors"),
        ("vae = 'nix'", "there is no bundle 'nix'"),
    ],
)
def test_what_a_model_cannot_be_opened_with_is_said_when_the_file_is_read(tmp_path: Path, text: str, said: str) -> None:
    config = read(tmp_path, f"[models.a]\nbundle = 'talbot'\n{text}")
    with pytest.raises(CalotypeError, match=said):
        config.served()


@pytest.mark.parametrize("name", ["gpu", ""])
def test_an_unknown_backend_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(BackendError, match="valid: auto"):
        read(tmp_path, f"backend = '{name}'", {"talbot": "talbot"})


def test_a_file_that_is_not_there_and_a_bundle_that_is_not_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nix\.toml does not exist"):
        ServeConfig.read(tmp_path / "nix.toml", {}, {})
    with pytest.raises(CalotypeError, match="there is no bundle 'nix'"):
        ServeConfig.read(None, {"a": "nix"}, {}).served()


def test_keys_open_other_addresses(tmp_path: Path) -> None:
    assert read(tmp_path, "host = '0.0.0.0'\napi_key_file = 'keys'", {"talbot": "talbot"}).host == "0.0.0.0"


def test_names_of_models(tmp_path: Path) -> None:
    assert model_names(["talbot", "photo=models/sd15", f"{tmp_path}/sdxl/"]) == {
        "talbot": "talbot",
        "photo": "models/sd15",
        "sdxl": f"{tmp_path}/sdxl/",
    }
    with pytest.raises(InputError, match="two models have the name talbot"):
        model_names(["talbot", "talbot=other"])
    with pytest.raises(InputError, match="write NAME=BUNDLE"):
        model_names(["=x"])


def test_the_file_in_the_documentation_is_one() -> None:
    (text,) = re.findall(r"^```toml\n(.*?)^```", (DOCS / "serving.md").read_text(), re.M | re.S)
    table = tomllib.loads(text)
    models = {name: from_table(ModelConfig, own, name) for name, own in table.pop("models").items()}
    limits = from_table(Limits, table.pop("limits"), "limits")
    config = from_table(ServeConfig, table, "the file", models=models, limits=limits)
    assert (config.max_seconds, config.limits.steps, list(config.models)) == (120.0, 60, ["talbot", "photo"])


UNREADABLE = {
    "dots": "a." * 50_000 + "b = 1",  # of which tomllib makes gigabytes
    "deep": "port = " + "[" * 100_000,
    "digits": "port = " + "1" * 5000,
    "large": "#" * (2 << 20),
    "control": 'host = "\x1b[2J"',
}


@pytest.mark.parametrize("text", UNREADABLE.values(), ids=UNREADABLE.keys())
def test_a_hostile_file_is_one_line(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError) as caught:
        read(tmp_path, text, {"talbot": "talbot"})
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000


def read_config(path: Path) -> ServeConfig:
    return ServeConfig.read(path, {}, {})


@pytest.mark.parametrize("reader", [read_config, read_keys])
def test_pipes_and_devices_are_no_files(tmp_path: Path, reader: Callable[[Path], object]) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(InputError, match="It is a pipe, a device or a socket, not a file"):
            reader(path)


def test_keys_that_cannot_be_read_are_not_quoted(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"alice:secret-secret-secret-\xff")
    (tmp_path / "large").write_bytes(b"#" * (2 << 20))
    for name, message in (("latin", "it is no text in UTF-8"), ("large", "larger than 1 MiB"), ("a\0b", "null")):
        with pytest.raises(InputError, match=message) as caught:
            read_keys(tmp_path / name)
        assert "secret" not in str(caught.value)


def written(value: Any) -> str:
    """A value in TOML; texts are written as JSON has them, but for halves of characters."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, dict):
        return "{" + ", ".join(f"{written(key)} = {written(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(written, value))}]"
    return str(value).lower()


WORDS = st.sampled_from(["talbot", "cpu", "auto", "512x512", "0x0", "99999999x9", "::1", "10.0.0.1/8", "*", "", "/"])
PLAIN = st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.integers(-2, 3) | st.floats()
PLAIN |= WORDS | st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
ANY = st.recursive(
    PLAIN, lambda own: st.lists(own, max_size=3) | st.dictionaries(st.just("a") | WORDS, own, max_size=2), max_leaves=4
)


def table_of(kind: type[Any]) -> st.SearchStrategy[str]:
    names = st.sampled_from([field.name for field in dataclasses.fields(kind)])
    tables = st.dictionaries(names | st.text(max_size=3), ANY, max_size=3)
    return tables.map(lambda own: "".join(f"{written(key)} = {written(value)}\n" for key, value in own.items()))


TABLES = st.tuples(table_of(ServeConfig), WORDS, table_of(ModelConfig), table_of(Limits)).map(
    lambda own: f"{own[0]}[models.{written(own[1])}]\n{own[2]}[limits]\n{own[3]}"
)
FUZZ: dict[str, Any] = {"deadline": None, "suppress_health_check": list(HealthCheck)}


def survives(tmp_path: Path, text: str) -> None:
    try:
        config = read(tmp_path, text)
        assert config.bounds.max_running > 0
        config.settings()
        config.served()
    except CalotypeError as error:
        assert len(str(error)) < 2100 and "\n" not in str(error)


@settings(max_examples=150, derandomize=True, **FUZZ)
@given(text=TABLES)
def test_any_values_are_a_configuration_or_one_line(tmp_path: Path, text: str) -> None:
    survives(tmp_path, text)


@pytest.mark.slow
@settings(max_examples=5000, **FUZZ)
@given(text=TABLES)
def test_very_many_configurations(tmp_path: Path, text: str) -> None:
    survives(tmp_path, text)
