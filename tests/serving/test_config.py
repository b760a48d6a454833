"""``serve.toml`` and options: what is wrong is one line that names it."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from calotype.runtime.errors import BackendError, CalotypeError, InputError
from calotype.serving.config import ModelConfig, ServeConfig, from_table, model_names
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
    config = read(tmp_path, FULL, max_queue=5, host=None)
    assert (config.port, config.devices, config.max_queue, config.max_seconds) == (0, (1, 0), 5, 20.0)
    assert list(config.models) == ["photo", "talbot"]
    assert config.models["talbot"].bundle == "talbot"
    served = config.served()["photo"]
    assert served.open.sizes == ((64, 96),)
    assert served.open.fast
    assert served.loras == {"style": Path("loras/style.safetensors")}
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
        ("max_running = 0", "max_running=0 is out of range; give 1 or more"),
        ("devices = 1", "devices in .* is 1, no list"),
        ("devices = [0, 0]", "different GPUs"),
        ("devices = [0]\nworkers = 2", "not both"),
        ("host = '0.0.0.0'", "there are no keys; give --api-key-file"),
        ("host = 'example.org'", "there are no keys"),
        ("[models.a]\nwarm = ['12']", "the size '12' is none; write WIDTHxHEIGHT"),
        ("[models.a]\nlora = 1", r"\[models.a\] of .* has unknown settings: lora; valid: backend, bundle"),
        ("[limits]\nstep = 3", r"\[limits\] of .* has unknown settings: step; valid: bodies_bytes"),
        ("[limits]\nsteps = 0", "the limit steps=0"),
        ("models = 3", "models that are no tables"),
        ("=", "no file of settings in TOML"),
        ("", "no model to serve"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        read(tmp_path, text, {} if "models" in text or not text else {"talbot": "talbot"})


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
