"""These tests need an NVIDIA GPU; without one they are skipped, and say why."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from calotype.engine.build import Options, build_bundle
from calotype.engine.profiles import Profile, default_profile
from calotype.runtime.bundle.folder import Bundle
from calotype.runtime.errors import CalotypeError
from calotype.runtime.sessions import obstacle
from calotype.runtime.sessions.cuda import Cuda, load_cuda
from calotype.runtime.sessions.libraries import installed


@pytest.fixture(scope="session")
def gpu() -> Cuda:
    try:
        return load_cuda("cuda")
    except CalotypeError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session", params=["tensorrt", "tensorrt-rtx", "cuda"])
def backend(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Each backend whose package is there; plans of talbot are built for those that need some."""
    request.getfixturevalue("gpu")
    name = str(request.param)
    talbot = Bundle.open("talbot")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CALOTYPE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        if name != "cuda":
            if not installed(name):
                pytest.skip(f"{name} is not installed")
            build_bundle(talbot, backend=name, profiles=[profile_of(talbot)])
        reason = obstacle(name, talbot.path)
    if reason is not None:
        pytest.skip(reason)
    return name


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One cache for all, apart from the user's."""
    folder = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setenv("CALOTYPE_CACHE", str(folder))
    return folder


@pytest.fixture
def stripped(backend: str) -> str:
    """A backend that has plans of talbot without weights, and no others."""
    if backend == "cuda":
        pytest.skip("ONNX Runtime has no plans")
    talbot = Bundle.open("talbot")
    build_bundle(talbot, backend=backend, profiles=[profile_of(talbot)], options=Options(strip_weights=True))
    return backend


def profile_of(bundle: Bundle) -> Profile:
    """The default one, under a name of its own."""
    return dataclasses.replace(default_profile(bundle.manifest), name="test")
