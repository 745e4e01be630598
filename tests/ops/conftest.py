"""What tests of ops share: every instruction set of this machine, and comparison with a reference."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from helexa import _C

ISAS = {"portable": 0, "avx2": 1, "avx512": 2, "avx512vnni": 3}
HIGHEST = max(ISAS.values())


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test with the kernels of each instruction set that this machine has."""
    _C.limit_isa(ISAS[request.param])
    try:
        if _C.cpu_isa() != request.param:
            pytest.skip(f"this machine has no {request.param}")
        yield request.param
    finally:
        _C.limit_isa(HIGHEST)


def _assert_close(name: str, reference: Tensor, actual: Tensor, rms_ratio: float) -> None:
    """Fails if `actual` has a NaN or differs by more than that share of the root mean square."""
    assert actual.shape == reference.shape
    assert actual.dtype == reference.dtype
    assert not actual.isnan().any(), f"{name}: {int(actual.isnan().sum())} NaN of {actual.numel()} values"
    difference = (actual.double() - reference.double()).square().mean().sqrt()
    scale = reference.double().square().mean().sqrt()
    assert difference <= rms_ratio * scale, f"{name}: differs by {float(difference / scale):.3g} of the rms"


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def assert_close() -> Callable[[str, Tensor, Tensor, float], None]:
    return _assert_close


@pytest.fixture
def poisoned() -> Callable[..., Tensor]:
    """Makes a tensor of NaN, so that a value which the kernel does not write is seen."""
    return lambda *shape, dtype=torch.float32: torch.full(shape, torch.nan, dtype=dtype)
