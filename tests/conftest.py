"""Fixtures that every folder of tests may use."""

import os

import hypothesis
import pytest

os.environ.setdefault(
    "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
)  # wanted by torch's deterministic mode, before CUDA starts

# A test that is slow on a busy machine has not failed.
hypothesis.settings.register_profile("helexa", deadline=None)
hypothesis.settings.load_profile("helexa")


@pytest.fixture(params=["cpu", pytest.param("cuda:0", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> str:
    """Runs the test on the CPU and, where there is one, on a CUDA device."""
    torch = pytest.importorskip("torch")
    if request.param != "cpu" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return str(request.param)
