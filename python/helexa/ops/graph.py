"""Recorded op calls on the CPU, replayed as one call: the counterpart of a CUDA graph."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from helexa import _C

# What may touch tensors during a capture: allocations and views compute nothing that a replay could miss.
_ALLOCATIONS = {"aten::empty", "aten::empty_strided", "aten::new_empty"}
_VIEWS = {
    f"aten::{name}"
    for name in (
        *("view", "_unsafe_view", "_reshape_alias", "alias", "detach", "lift_fresh", "as_strided", "expand"),
        *("slice", "select", "narrow", "split", "split_with_sizes", "unbind"),
        *("squeeze", "unsqueeze", "t", "transpose", "permute"),
    )
}


class CpuGraph:
    """Op calls with their addresses.

    `with graph.capture(): out = model(step)` records the calls without running them; `replay()` runs them.
    Tensors allocated during the capture live as long as the graph.  Inputs are read at their captured
    addresses, so change them in place.
    """

    def __init__(self) -> None:
        self._calls = _C.CpuGraph()
        self._keep: list[Tensor] = []

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Records the op calls of this thread; raises RuntimeError if torch itself is asked to compute."""
        self._keep.clear()
        with _ViewsOnly(self._keep):
            self._calls.begin_capture()
            try:
                yield
            finally:
                self._calls.end_capture()

    def replay(self) -> None:
        """Runs the recorded calls, without the interpreter lock."""
        self._calls.replay()

    def __len__(self) -> int:
        return len(self._calls)


class _ViewsOnly(TorchDispatchMode):
    def __init__(self, keep: list[Tensor]) -> None:
        super().__init__()
        self._keep = keep

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._schema.name
        call: Callable[..., Any] = func
        if name in _ALLOCATIONS:
            out = call(*args, **(kwargs or {}))
            self._keep.append(out)
            return out
        if name not in _VIEWS:
            raise RuntimeError(
                f"{name} computes with torch while a CPU graph is captured: a replay would not repeat it"
            )
        return call(*args, **(kwargs or {}))


# torch wraps the method such that its first call imports torch._dynamo, which takes seconds and serves
# nothing here.
_dispatch: Any = _ViewsOnly.__torch_dispatch__
_ViewsOnly.__torch_dispatch__ = getattr(_dispatch, "__wrapped__", _dispatch)  # type: ignore[method-assign]
