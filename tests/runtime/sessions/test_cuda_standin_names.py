"""The stand-ins have no name that the real libraries have not, and the real CUDA bindings take our arguments."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import tensorrt_rtx
from cuda.bindings import runtime

from calotype.runtime.errors import BackendError
from calotype.runtime.sessions import cuda
from tests.runtime import cuda_standin

CLASSES = {
    "Runtime": (tensorrt_rtx.Runtime,),
    "Engine": (tensorrt_rtx.ICudaEngine,),
    "Context": (tensorrt_rtx.IExecutionContext,),
    "Configuration": (tensorrt_rtx.IRuntimeConfig, tensorrt_rtx.IRuntimeCache),
    "Refitter": (tensorrt_rtx.Refitter, tensorrt_rtx.OnnxParserRefitter),
}
CALLS: dict[str, tuple[Any, ...]] = {
    "gpu": (),
    "free_memory": (),
    "malloc": (256,),
    "free": (4096,),
    "host_alloc": (256,),
    "host_free": (4096,),
    "create_stream": (),
    "destroy_stream": (7,),
    "copy_to_device": (4096, 8192, 16, 7),
    "copy_to_host": (4096, 8192, 16, 7),
    "synchronize": (7,),
    "begin_capture": (7,),
    "end_capture": (7,),
    "launch": (runtime.cudaGraphExec_t(), 7),
    "destroy_graph": (runtime.cudaGraphExec_t(),),
}


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_the_library_has_every_method_of_its_stand_in(name: str) -> None:
    methods = [item for item, _ in inspect.getmembers(getattr(cuda_standin, name), inspect.isfunction)]
    public = [item for item in methods if not item.startswith("_")]
    assert public
    assert [item for item in public if not any(hasattr(real, item) for real in CLASSES[name])] == []


def test_the_libraries_have_every_other_name_of_their_stand_ins() -> None:
    for name in (item for item in vars(cuda_standin.Library) if not item.startswith("_")):
        assert hasattr(tensorrt_rtx, name), name
    for name in (item for item in vars(cuda_standin.Cuda) if item.startswith("cuda")):
        assert hasattr(runtime, name), name
    for name in cuda.ADVICE:
        assert hasattr(runtime.cudaError_t, name), name


@pytest.mark.skipif(
    runtime.cudaGetDeviceCount()[0] != runtime.cudaError_t.cudaErrorInsufficientDriver,
    reason="a driver would take the made-up addresses for real ones",
)
def test_the_bindings_take_the_arguments_of_every_call() -> None:
    """They are converted before the driver is asked for, whose absence is then all that is wrong."""
    device = cuda.Cuda(runtime)
    for name, arguments in CALLS.items():
        with pytest.raises(BackendError, match="failed: cudaErrorInsufficientDriver"):
            getattr(device, name)(*arguments)
