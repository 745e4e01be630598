"""Fixtures that every folder of tests may use."""

import importlib.util
import os
import sys
from pathlib import Path

import hypothesis
import pytest

import helexa
from helexa.errors import SourceError
from helexa.weights.sources import resolve


def _use_emulated_cuda(folder: Path) -> None:
    """Puts an extension that runs CUDA kernels on the host in the place of helexa._C."""
    assert "helexa.ops" not in sys.modules, "too late: helexa.ops has the other extension"
    (file,) = folder.glob("_C*.so")
    spec = importlib.util.spec_from_file_location("_C", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["helexa._C"] = module
    helexa._C = module  # type: ignore[attr-defined]


# Before anything imports helexa.ops: docs/kernels.md says how such an extension is built.
EMULATED = "HELEXA_EMULATED" in os.environ
if EMULATED:
    _use_emulated_cuda(Path(os.environ["HELEXA_EMULATED"]))

os.environ.setdefault(
    "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
)  # wanted by torch's deterministic mode, before CUDA starts

# A test that is slow on a busy machine has not failed.
hypothesis.settings.register_profile("helexa", deadline=None)
hypothesis.settings.load_profile("helexa")


@pytest.fixture(scope="session")
def starter_model() -> Path:
    """The starter model in the cache; tests that need it are marked `model` and skip without it."""
    try:
        return resolve("starter")
    except SourceError:
        pytest.skip("no starter model in the cache; `helexa pull starter` fetches it")


@pytest.fixture(params=["cpu", pytest.param("cuda:0", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> str:
    """Runs the test on the CPU and, where there is one, on a CUDA device; the host may stand for that."""
    torch = pytest.importorskip("torch")
    if EMULATED:
        if request.param == "cpu":
            pytest.skip("the host stands for a CUDA device")
        return "cpu"
    if request.param != "cpu" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return str(request.param)


@pytest.fixture
def cuda_device() -> str:
    """A CUDA device, or "cpu" where the host stands for one; for tests marked `cuda`."""
    torch = pytest.importorskip("torch")
    if EMULATED:
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return "cuda:0"
