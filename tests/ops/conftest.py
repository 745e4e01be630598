"""What tests of ops share: every instruction set of this machine, and comparison with a reference."""

from collections.abc import Callable, Iterator
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from helexa import _C
from helexa.ops import PackedWeight, Rows, pack_weight
from helexa.ops.tensor import EMULATED
from support.random_weights import random_raw

T = TypeVar("T")

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


@pytest.fixture
def cuda_capture() -> Callable[[Callable[[], T]], tuple[Callable[[], None], T]]:
    """Captures a call into a CUDA graph: what replays it, and what the call returned."""
    if EMULATED:
        pytest.skip("the host has no CUDA graphs")

    def capture(call: Callable[[], T]) -> tuple[Callable[[], None], T]:
        call()  # a kernel's first launch loads it, which no capture allows
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = call()

        def replay() -> None:
            graph.replay()
            torch.cuda.synchronize()

        return replay, result

    return capture


def _decoded(rows: Rows) -> Tensor:
    """float32 [T, cols] of what an op on a CUDA device hands to the next matmul, as that one sees it."""
    if isinstance(rows, Tensor):
        return rows.float()
    if rows.bf16 is not None:
        return rows.bf16.float()
    assert rows.q8 is not None
    # Groups of 64 columns: lane, half of 32, quarter of 16, 4 columns; then {scale, sum} of each 32.
    num_groups = rows.q8.shape[1] // 80
    codes = rows.q8[:, : 64 * num_groups].view(torch.int8).unflatten(1, (num_groups, 4, 2, 2, 4))
    codes = codes.permute(0, 1, 3, 4, 2, 5).flatten(1).unflatten(1, (-1, 32)).float()
    scales = rows.q8[:, 64 * num_groups :].contiguous().view(torch.float32).unflatten(1, (-1, 2))
    sums = (codes.sum(-1) * scales[..., 0], scales[..., 1])
    assert torch.allclose(*sums, rtol=1e-5, equal_nan=True), "a sum of codes is not that of its block"
    return (codes * scales[..., :1]).flatten(1)[:, : rows.cols]


@pytest.fixture
def decoded() -> Callable[[Rows], Tensor]:
    return _decoded


@pytest.fixture
def make(cuda_device: str) -> Callable[..., PackedWeight]:
    """make(format, rows, cols, seed): a random weight on the device."""

    def weight(format: str, rows: int, cols: int, seed: int = 0) -> PackedWeight:
        return pack_weight(format, random_raw(format, rows, cols, seed), rows, cols, cuda_device)

    return weight
