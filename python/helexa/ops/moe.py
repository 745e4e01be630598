"""Mixture of experts: routing, and SwiGLU experts over packed weights without a Python loop over experts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from helexa import _C
from helexa.ops.activation import MAX_MATVEC_ROWS, Activation, Rows, quantize_rows
from helexa.ops.pack import TILE_ROWS, PackedWeight
from helexa.ops.quant_matmul import gated_matmul, quant_matmul, quantize_input_reference
from helexa.ops.silu_mul import silu_mul
from helexa.ops.tensor import address, check, check_tensor, dtype_id, on_cuda, stream

MAX_EXPERTS, MAX_TOP_K = 1024, 32  # csrc/ops/moe_cuda.cuh
FLOAT_FORMATS = ("f32", "f16", "bf16")
MAX_DECODE_ROWS = (
    16  # up to here most experts have no second token, and their weights are multiplied as they are
)
_PART_ROWS = 4096  # that are multiplied at a time, so that memory for what lies between is bounded


@dataclass(frozen=True, eq=False)
class SharedExpert:
    """The expert that every token goes to.

    gate_up: [S, H] twice.   down: [H, S].   gate: [1, H], whose sigmoid is its weight; None for one.
    """

    gate_up: Sequence[PackedWeight]
    down: PackedWeight
    gate: PackedWeight | None = None


@dataclass(frozen=True, eq=False)
class _Layer:
    """What sparse_moe takes besides rows."""

    router: PackedWeight
    gate_up: Sequence[PackedWeight]
    down: PackedWeight
    shared: SharedExpert | None
    top_k: int
    normalize: bool

    def check(self, cols: int) -> None:
        """Raises ValueError unless the CUDA kernels take rows of `cols` and these weights."""
        num_experts = self.router.rows
        check(
            1 <= self.top_k <= min(num_experts, MAX_TOP_K) and num_experts <= MAX_EXPERTS,
            lambda: (
                f"sparse_moe: {self.top_k} of {num_experts} experts; "
                f"a device takes {MAX_TOP_K} of {MAX_EXPERTS}"
            ),
        )
        _check_stacks("sparse_moe", self.gate_up, self.down, num_experts, cols)
        if self.shared is not None:
            _check_stacks("sparse_moe", self.shared.gate_up, self.shared.down, 1, cols)
        for weight in self._routers():
            if weight.format not in FLOAT_FORMATS or weight.cols != cols:
                shape = [weight.rows, weight.cols]
                raise ValueError(f"sparse_moe: a router {shape} of {weight.format} for {cols} columns")

    def views(self) -> _C.MoeWeights:
        router, *shared_router = [weight.view for weight in self._routers()]
        gate_up = [stack.view for stack in self.gate_up]
        shared_gate_up, shared_down = [], []
        if self.shared is not None:
            shared_gate_up = [weight.view for weight in self.shared.gate_up]
            shared_down = [self.shared.down.view]
        return _C.MoeWeights(router, shared_router, gate_up, self.down.view, shared_gate_up, shared_down)

    def _routers(self) -> list[PackedWeight]:
        gate = None if self.shared is None else self.shared.gate
        return [self.router] if gate is None else [self.router, gate]


def sparse_moe(
    x: Rows,
    router: PackedWeight,
    gate_up: Sequence[PackedWeight],
    down: PackedWeight,
    *,
    top_k: int,
    normalize: bool,
    shared: SharedExpert | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """moe_route of x · routerᵀ, then moe_mlp, with the shared expert if there is one.

    x: [T, H]; on CUDA with the float32 rows besides, which the router reads.
    router: [E, H], on CUDA of a float format.   gate_up, down: the stacks of moe_mlp.
    out: [T, H] float32, on CUDA of more than MAX_MATVEC_ROWS rows bfloat16.
    On CUDA up to MAX_DECODE_ROWS rows are multiplied as quant_matmul multiplies few rows, and a row's result
    does not depend on the rows beside it; more are multiplied in bfloat16 with float32 sums.
    Raises ValueError if a shape, dtype or format does not fit.  Capturable.
    """
    if isinstance(x, Activation):
        return _on_cuda(x, _Layer(router, gate_up, down, shared, top_k, normalize), out)
    ids, weights = moe_route(quant_matmul(x, [router]), top_k, normalize=normalize)
    mixed = shared_gate = None
    if shared is not None:
        mixed = quant_matmul(silu_mul(quant_matmul(x, shared.gate_up)), [shared.down])
        shared_gate = None if shared.gate is None else quant_matmul(x, [shared.gate])
    return moe_mlp(
        *(x, ids, weights, gate_up, down),
        num_experts=router.rows,
        shared=mixed,
        shared_gate=shared_gate,
        out=out,
    )


def moe_route(
    logits: Tensor, top_k: int, *, normalize: bool, ids: Tensor | None = None, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(ids, weights) of the top_k most likely experts: their softmax, divided by its sum if `normalize`.

    logits: [T, E] float32.   ids: [T, top_k] int32, by falling probability, the lower id first where equal.
    weights: [T, top_k] float32.   Raises ValueError if a shape or dtype does not fit.  Capturable.
    """
    num_tokens, num_experts = logits.shape
    check(
        logits.dtype == torch.float32 and logits.is_contiguous(),
        "moe_route: logits must be contiguous float32",
    )
    check(1 <= top_k <= num_experts, lambda: f"moe_route: top_k {top_k} of {num_experts} experts")
    shape = (num_tokens, top_k)
    ids = torch.empty(shape, dtype=torch.int32, device=logits.device) if ids is None else ids
    weights = torch.empty(shape, device=logits.device) if weights is None else weights
    check_tensor("moe_route", "ids", ids, shape, torch.int32)
    check_tensor("moe_route", "weights", weights, shape, torch.float32)
    arguments: list[Any] = [logits.data_ptr(), ids.data_ptr(), weights.data_ptr()]
    arguments += (num_tokens, num_experts, top_k, normalize)
    if on_cuda(logits):
        check(
            num_experts <= MAX_EXPERTS and top_k <= MAX_TOP_K,
            lambda: (
                f"moe_route: {top_k} of {num_experts} experts; a device takes {MAX_TOP_K} of {MAX_EXPERTS}"
            ),
        )
        arguments.append(stream(logits))
        _C.moe_route_cuda(*arguments)
    else:
        _C.moe_route_cpu(*arguments)
    return ids, weights


def moe_mlp(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Sequence[PackedWeight],
    down: PackedWeight,
    *,
    num_experts: int,
    shared: Tensor | None = None,
    shared_gate: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Σ_j weights[t, j] · down(silu(gate(x)) · up(x)) of expert ids[t, j] + sigmoid(shared_gate) · shared.

    x: [T, H] float32.   ids: [T, k] int32, below num_experts.   weights: [T, k] float32.
    gate_up: one stack [E·2F, H], each expert's gate rows before its up rows, or two [E·F, H], gate and up.
    down: [E·H, F].   F and H are multiples of 16.   shared: [T, H]; shared_gate: [T, 1], not given is one.
    out: [T, H] float32, no overlap with the others.
    Inputs are rounded as quant_matmul rounds them.  Raises ValueError if a shape or dtype does not fit.
    Capturable: allocates only `out`.
    """
    num_tokens, cols = x.shape
    out = torch.empty(num_tokens, cols) if out is None else out
    pairs = tuple(ids.shape)
    check_tensor("moe_mlp", "x", x, (num_tokens, cols), torch.float32)
    check(
        len(pairs) == 2 and pairs[0] == num_tokens,
        lambda: f"moe_mlp: ids {pairs} do not fit x {tuple(x.shape)}",
    )
    check_tensor("moe_mlp", "ids", ids, pairs, torch.int32)
    check_tensor("moe_mlp", "weights", weights, pairs, torch.float32)
    check_tensor("moe_mlp", "out", out, (num_tokens, cols), torch.float32)
    if shared is not None:
        check_tensor("moe_mlp", "shared", shared, (num_tokens, cols), torch.float32)
    if shared_gate is not None:
        check_tensor("moe_mlp", "shared_gate", shared_gate, (num_tokens, 1), torch.float32)
    _check_stacks("moe_mlp", gate_up, down, num_experts, cols)
    optional = address(shared), address(shared_gate)
    arguments: list[Any] = [x.data_ptr(), ids.data_ptr(), weights.data_ptr()]
    arguments += ([stack.view for stack in gate_up], [down.view], *optional, out.data_ptr())
    arguments += (num_tokens, num_experts, pairs[1])
    _C.moe_mlp_cpu(*arguments)
    return out


def moe_route_reference(logits: Tensor, top_k: int, *, normalize: bool) -> tuple[Tensor, Tensor]:
    """The same in torch."""
    probabilities = logits.softmax(-1)
    order = probabilities.argsort(dim=-1, descending=True, stable=True)[:, :top_k]
    weights = probabilities.gather(-1, order)
    return order.int(), weights / weights.sum(-1, keepdim=True) if normalize else weights


def moe_mlp_reference(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Sequence[Tensor],
    down: Tensor,
    *,
    shared: Tensor | None = None,
    shared_gate: Tensor | None = None,
) -> Tensor:
    """The same in torch over plain stacks [E, rows, columns], in the dtype of x."""
    out = torch.zeros_like(x) if shared is None else shared.clone()
    if shared_gate is not None:
        out *= shared_gate.sigmoid()
    both = torch.cat(list(gate_up), 1) if len(gate_up) == 2 else gate_up[0]
    for t, (chosen, shares) in enumerate(zip(ids.tolist(), weights, strict=True)):
        for expert, share in zip(chosen, shares, strict=True):
            gate, up = (both[expert] @ x[t]).chunk(2)
            out[t] += share * (down[expert] @ (functional.silu(gate) * up))
    return out


def sparse_moe_reference(
    x: Tensor,
    router: PackedWeight,
    gate_up: Sequence[PackedWeight],
    down: PackedWeight,
    *,
    top_k: int,
    normalize: bool,
    shared: SharedExpert | None = None,
    rounded: bool = True,
) -> Tensor:
    """The same in float64 over decoded weights; `rounded`: the inputs of quantized ones as int8."""
    stacks = [weight.dequantize().double().unflatten(0, (router.rows, -1)) for weight in (*gate_up, down)]
    both, last = torch.cat(stacks[:-1], 1), stacks[-1]

    def expert(rows: Tensor, first: Tensor, second: Tensor, formats: tuple[str, str]) -> Tensor:
        round_first, round_second = (rounded and format not in FLOAT_FORMATS for format in formats)
        gate, up = (_as_seen(rows, round_first) @ first.T).chunk(2, -1)
        return _as_seen(functional.silu(gate) * up, round_second) @ second.T

    logits = x.double() @ router.dequantize().double().T
    ids, weights = moe_route_reference(logits, top_k, normalize=normalize)
    out = torch.zeros_like(x, dtype=torch.float64)
    for e in ids.unique().tolist():
        tokens, slots = torch.nonzero(ids == e, as_tuple=True)
        result = expert(x[tokens], both[e], last[e], (gate_up[0].format, down.format))
        out.index_add_(0, tokens, result * weights[tokens, slots, None])
    if shared is not None:
        first = torch.cat([weight.dequantize().double() for weight in shared.gate_up])
        formats = (shared.gate_up[0].format, shared.down.format)
        result = expert(x, first, shared.down.dequantize().double(), formats)
        share = 1.0 if shared.gate is None else (x.double() @ shared.gate.dequantize().double().T).sigmoid()
        out += share * result
    return out.float()


def _as_seen(rows: Tensor, rounded: bool) -> Tensor:
    return quantize_input_reference(rows.float()) if rounded else rows.double()


def _on_cuda(x: Activation, layer: _Layer, out: Tensor | None) -> Tensor:
    num_tokens, cols = x.num_rows, x.cols
    rows = x.x
    if rows is None:
        raise ValueError("sparse_moe: the router needs the rows as floats")
    check_tensor("sparse_moe", "x", rows, (num_tokens, cols), torch.float32)
    layer.check(cols)
    dtype = torch.float32 if num_tokens <= MAX_MATVEC_ROWS else torch.bfloat16
    out = torch.empty((num_tokens, cols), dtype=dtype, device=rows.device) if out is None else out
    check_tensor("sparse_moe", "out", out, (num_tokens, cols), dtype)
    if num_tokens <= MAX_DECODE_ROWS:
        _few_rows(x, rows, layer, out)
        return out
    for first in range(0, num_tokens, _PART_ROWS):
        part = slice(first, first + _PART_ROWS)
        _many_rows(x[part], rows[part], layer, out[part])
    return out


def _few_rows(x: Activation, rows: Tensor, layer: _Layer, out: Tensor) -> None:
    q8 = quantize_rows(rows).q8 if x.q8 is None else x.q8
    assert q8 is not None
    weights, num_tokens, top_k = layer.views(), rows.shape[0], layer.top_k
    workspace = _workspace(_C.moe_few_workspace_bytes(weights, num_tokens, top_k), rows.device)
    arguments: list[Any] = [rows.data_ptr(), q8.data_ptr(), address(x.squares), x.eps, weights]
    arguments += (layer.normalize, out.data_ptr(), workspace.data_ptr(), num_tokens, top_k, stream(rows))
    _C.moe_few_cuda(*arguments)


def _many_rows(x: Activation, rows: Tensor, layer: _Layer, out: Tensor) -> None:
    bf16 = rows.bfloat16() if x.bf16 is None else x.bf16
    logits = rows @ _as_floats(layer.router).T
    mixed = shared_logits = None
    if (shared := layer.shared) is not None:
        mixed = quant_matmul(gated_matmul(x, shared.gate_up), [shared.down])
        shared_logits = None if shared.gate is None else rows @ _as_floats(shared.gate).T
    weights, num_tokens, top_k = layer.views(), rows.shape[0], layer.top_k
    workspace = _workspace(_C.moe_many_workspace_bytes(weights, num_tokens, top_k), rows.device)
    arguments: list[Any] = [
        bf16.data_ptr(),
        logits.data_ptr(),
        address(shared_logits),
        weights,
        layer.normalize,
    ]
    arguments += (address(mixed), 0 if mixed is None else dtype_id(mixed), out.data_ptr(), dtype_id(out))
    arguments += (workspace.data_ptr(), num_tokens, top_k, stream(rows))
    _C.moe_many_cuda(*arguments)


def _workspace(nbytes: int, device: torch.device) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device=device)


def _as_floats(weight: PackedWeight) -> Tensor:
    """A matrix of a float format as float32."""
    dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[weight.format]
    return weight.data.view(dtype).view(weight.rows, weight.cols).float()


def _check_stacks(
    op: str, gate_up: Sequence[PackedWeight], down: PackedWeight, num_experts: int, cols: int
) -> None:
    check(len(gate_up) in (1, 2), lambda: f"{op}: {len(gate_up)} stacks of gate and up")
    for stack in (*gate_up, down):
        if stack.rows % (num_experts * TILE_ROWS):
            raise ValueError(
                f"{op}: a stack of {stack.rows} rows over {num_experts} experts; rows of an expert must be "
                f"a multiple of {TILE_ROWS}"
            )
    first, last = gate_up[0], gate_up[-1]
    width = sum(stack.rows for stack in gate_up) // num_experts
    check(
        (first.rows, first.cols, last.cols) == (last.rows, cols, cols)
        and (down.cols * 2, down.rows) == (width, num_experts * cols),
        lambda: f"{op}: stacks {[(s.rows, s.cols) for s in (*gate_up, down)]} do not fit {cols} columns",
    )
