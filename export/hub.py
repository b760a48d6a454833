"""Repositories of the Hugging Face Hub, fetched through ``huggingface_hub`` into its own cache.

``HF_HOME``, ``HF_HUB_OFFLINE`` and the token are honoured by that library.
"""

from __future__ import annotations

import re
from pathlib import Path

from calotype.export.components import MODEL_WEIGHTS
from calotype.export.families import families
from calotype.export.json_files import read_json
from calotype.export.weight_files import pickle_names, shards, weight_names
from calotype.runtime.bundle.manifest import SAFETY_CHECKER
from calotype.runtime.errors import CheckpointError, MissingPackageError

REPOSITORY = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[^@]+))?")
TOKENIZER = ("tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt", "tokenizer.json")


def is_repository(source: str) -> bool:
    """Whether it is spelt ``owner/name`` or ``owner/name@revision``."""
    return REPOSITORY.fullmatch(source) is not None


def download(source: str, variant: str | None = None, *, safety_checker: bool = False) -> Path:
    """Fetch what an export reads of ``owner/name[@revision]``, one variant of the weights.

    Pickled ones are fetched where there are no others; no code of theirs is ever run.

    Args:
        source: the repository.
        variant: of the weights, where a component has it; the plain ones, or else float16's, where it has not.
        safety_checker: whether to fetch the safety checker, too.

    Returns:
        The folder in the cache, named after the commit.

    Raises:
        CheckpointError: it is not there, may not be read, or cannot be reached and is not in the cache.
        MissingPackageError: ``huggingface_hub`` is not installed.
    """
    try:
        from huggingface_hub import errors
    except ModuleNotFoundError as error:
        raise MissingPackageError("huggingface_hub", "hub") from error
    match = REPOSITORY.fullmatch(source)
    assert match is not None
    name = match["name"]
    try:
        return _Repository(name, match["revision"], variant).fetch_all(safety_checker=safety_checker)
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{name} is gated; accept its terms at https://huggingface.co/{name} and log in with: hf auth login"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{source} is no folder here and no model on the Hugging Face Hub that you may read; "
            "check the spelling, or log in with: hf auth login"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{name} has no revision {match['revision']!r} on the Hugging Face Hub") from error
    except (errors.HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{source} cannot be fetched from the Hugging Face Hub: {reason}") from error


class _Repository:
    """One repository at one commit."""

    def __init__(self, name: str, revision: str | None, variant: str | None) -> None:
        self.name, self.revision, self.variant = name, revision, variant
        self.folder: Path | None = None

    def fetch_all(self, *, safety_checker: bool) -> Path:
        if not self._fetch("model_index.json") and self._fetch("config.json"):
            self._fetch_weights("", MODEL_WEIGHTS)
        if self.folder is None:
            raise self._missing("model_index.json")
        for component, library, kind in self._components(self.folder):
            if kind.endswith(("Tokenizer", "TokenizerFast")):
                for file in TOKENIZER:
                    self._fetch(f"{component}/{file}")
            elif component == "scheduler":
                self._fetch(f"{component}/scheduler_config.json")
            else:
                self._fetch(f"{component}/config.json")
                self._fetch_weights(f"{component}/", "model" if library == "transformers" else MODEL_WEIGHTS)
        if safety_checker and self._fetch(f"{SAFETY_CHECKER}/config.json"):
            self._fetch_weights(f"{SAFETY_CHECKER}/", "model")
            self._fetch("feature_extractor/preprocessor_config.json")
        return self.folder

    def _components(self, folder: Path) -> list[tuple[str, str, str]]:
        """Those that a family reads of what the index has: the name, its library and its class, or two nulls."""
        index = read_json(folder / "model_index.json") if (folder / "model_index.json").exists() else {}
        read = {
            name for family in families() if index.get("_class_name") in family.pipelines for name in family.folders
        }
        entries = [(name, *index[name]) for name in index if name in read]
        return [(name, str(library), str(kind)) for name, library, kind in entries if library is not None]

    def _fetch_weights(self, prefix: str, stem: str) -> None:
        chosen = [] if self.variant is None else [self.variant]
        names = [name for own in chosen for names in (weight_names, pickle_names) for name in names(stem, own)] + [
            *weight_names(stem),
            *pickle_names(stem),
        ]
        found = next((name for name in names if self._fetch(prefix + name)), None)
        if found is None or self.folder is None:
            raise self._missing(f"{prefix}{stem}.safetensors")
        for shard in shards(self.folder / prefix / found) if found.endswith(".json") else []:
            if not self._fetch(prefix + shard.name):
                raise self._missing(prefix + shard.name)

    def _fetch(self, file: str) -> bool:
        """Is ``file`` in the cache now? The first one that is settles the commit."""
        from huggingface_hub import constants, hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        if self.folder is not None and (self.folder / file).exists():
            return True
        revision = self.revision if self.folder is None else self.folder.name
        try:
            path = Path(hf_hub_download(self.name, file, revision=revision))
        except LocalEntryNotFoundError as error:
            if constants.HF_HUB_OFFLINE:
                return False
            raise CheckpointError(
                f"{self.name} is no folder here, and the Hugging Face Hub cannot be reached to fetch {file}; "
                "connect, or give a folder or a file"
            ) from error
        except EntryNotFoundError:
            return False
        self.folder = self.folder or path.parent
        return True

    def _missing(self, file: str) -> CheckpointError:
        from huggingface_hub import constants

        if constants.HF_HUB_OFFLINE:
            return CheckpointError(
                f"{self.name} is no folder here, and its {file} is not in the cache while HF_HUB_OFFLINE is set; "
                "unset it once, or give a folder or a file"
            )
        return CheckpointError(
            f"{self.name} has no {file}; repositories in diffusers' layout are read, other variants of their weights "
            "with --variant; a single file (.safetensors, .ckpt) is, once you have fetched it: hf download "
            f"{self.name} FILE"
        )
