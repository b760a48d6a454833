"""What lies at an adapter's path: a file, a folder by PEFT or by diffusers, or something else that is named."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from calotype.runtime.adapters.names import NETWORKS
from calotype.runtime.adapters.settings import Settings, by_network
from calotype.runtime.bundle.safetensors import SafetensorsFile
from calotype.runtime.errors import InputError
from calotype.runtime.untrusted import is_pickle, parse_json, read_bytes, stand_in, why

PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
DIFFUSERS_HEADER = "lora_adapter_metadata"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MOST_CONFIG = 16 << 20  # bytes
CONVERT = (
    "from safetensors.torch import save_file; import torch; "
    "save_file(torch.load('{path}', weights_only=True), '{target}')"
)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class AdapterFile:
    """Tensors in a file, and what is known of them.

    Attributes:
        settings: by network; "" is for whichever a key is for.
        network: that all keys are for, where its folder says so.
    """

    path: Path
    tensors: SafetensorsFile
    settings: Mapping[str, Settings]
    network: str | None = None

    def settings_for(self, network: str) -> Settings | None:
        """The settings of one network, None where there are none."""
        return self.settings.get(network, self.settings.get(""))


def read_adapter(path: Path) -> list[AdapterFile]:
    """The files that an adapter is of: one, or one for each network of a folder.

    Raises:
        InputError: there is none, or it is something else, which the message names.
    """
    if not path.is_dir():
        return [_single(path)]
    if (path / PEFT_CONFIG).exists():
        return [_peft(path, None)]
    parts = [name for name in NETWORKS if (path / name / PEFT_CONFIG).exists()]
    if parts:
        return [_peft(path / name, name) for name in parts]
    if (path / DIFFUSERS_WEIGHTS).exists():
        return [_single(path / DIFFUSERS_WEIGHTS)]
    return [_single(_only_file(path))]


def _only_file(folder: Path) -> Path:
    found = sorted(folder.glob("*.safetensors"))
    inner = sorted(config.parent.name for config in folder.glob(f"*/{PEFT_CONFIG}"))
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(file.name for file in found[:8])
        raise InputError(f"{folder} holds {len(found)} files; give one of them: {names}")
    if inner:
        raise InputError(f"{folder} holds several adapters; give the folder of one: {', '.join(inner[:8])}")
    pickles = sorted(file for file in folder.iterdir() if file.suffix.lower() in PICKLES)
    if pickles:
        raise _pickle(pickles[0])
    raise InputError(f"{folder} holds no LoRA; valid: a .safetensors file, or a folder with {PEFT_CONFIG}")


def _peft(folder: Path, network: str | None) -> AdapterFile:
    weights, config = folder / PEFT_WEIGHTS, folder / PEFT_CONFIG
    if not weights.exists():
        pickle = next((file for file in folder.glob("adapter_model.*") if file.suffix.lower() in PICKLES), None)
        raise _pickle(pickle) if pickle else InputError(f"{folder} has no {PEFT_WEIGHTS}; download it whole")
    try:
        settings = {"": Settings.read(parse_json(read_bytes(config, MOST_CONFIG)))}
    except InputError as error:
        raise InputError(f"{folder} {error}") from None
    except OSError as error:
        raise InputError(f"{config} cannot be read: {why(error)}; see that it is a file that you may read") from None
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise InputError(f"{config} is no configuration of PEFT: {why(error)}; take the publisher's own") from None
    return AdapterFile(path=weights, tensors=_tensors(weights), settings=settings, network=network)


def _single(path: Path) -> AdapterFile:
    tensors = _tensors(path)
    try:
        table = parse_json(tensors.metadata.get(DIFFUSERS_HEADER, "{}").encode())
        found = by_network(table, NETWORKS) if table else {}
        settings = {network: Settings.read(own) for network, own in found.items()}
    except InputError as error:
        raise InputError(f"{path} {error}") from None
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        message = f"the settings of {path} in its header's {DIFFUSERS_HEADER} cannot be used: {why(error)}"
        raise InputError(f"{message}; take the publisher's own, or save it again") from None
    return AdapterFile(path=path, tensors=tensors, settings=settings)


def _tensors(path: Path) -> SafetensorsFile:
    try:
        return SafetensorsFile(path)
    except InputError as error:
        raise _named(path) or error from None


def _named(path: Path) -> InputError | None:
    """What a file is that is no safetensors file, if that can be told."""
    what = stand_in(path)
    if what is not None:
        return InputError(f"{path} {what}")
    return _pickle(path) if is_pickle(path) else None


def _pickle(path: Path) -> InputError:
    code = CONVERT.format(path=path.name, target=path.with_suffix(".safetensors").name)
    return InputError(
        f"{path} is a pickle, which can hold code and is not read; fetch it as .safetensors, or convert it with "
        f'PyTorch: python -c "{code}"'
    )
