"""Fixtures that every folder of tests may use."""

import os
from pathlib import Path

import hypothesis
import pytest

from helexa.errors import SourceError
from helexa.weights.sources import resolve

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
    """Runs the test on the CPU and, where there is one, on a CUDA device."""
    torch = pytest.importorskip("torch")
    if request.param != "cpu" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return str(request.param)
