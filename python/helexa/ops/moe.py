"""Mixture of experts: routing, and SwiGLU experts over packed weights without a Python loop over experts."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from helexa import _C
from helexa.ops.pack import FORMAT_IDS, TILE_ROWS, PackedWeight
from helexa.ops.tensor import check, on_cuda, stream

MAX_EXPERTS, MAX_TOP_K = 1024, 32  # csrc/ops/moe_cuda.cuh


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
    check(1 <= top_k <= num_experts, f"moe_route: top_k {top_k} of {num_experts} experts")
    shape = (num_tokens, top_k)
    ids = torch.empty(shape, dtype=torch.int32, device=logits.device) if ids is None else ids
    weights = torch.empty(shape, device=logits.device) if weights is None else weights
    _check_like("moe_route", "ids", ids, shape, torch.int32)
    _check_like("moe_route", "weights", weights, shape, torch.float32)
    arguments: list[Any] = [logits.data_ptr(), ids.data_ptr(), weights.data_ptr()]
    arguments += (num_tokens, num_experts, top_k, normalize)
    if on_cuda(logits):
        check(
            num_experts <= MAX_EXPERTS and top_k <= MAX_TOP_K,
            f"moe_route: {top_k} of {num_experts} experts; a device takes {MAX_TOP_K} of {MAX_EXPERTS}",
        )
        _C.moe_route_cuda(*arguments, stream(logits))
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
    _check_like("moe_mlp", "x", x, (num_tokens, cols), torch.float32)
    check(len(pairs) == 2 and pairs[0] == num_tokens, f"moe_mlp: ids {pairs} do not fit x {tuple(x.shape)}")
    _check_like("moe_mlp", "ids", ids, pairs, torch.int32)
    _check_like("moe_mlp", "weights", weights, pairs, torch.float32)
    _check_like("moe_mlp", "out", out, (num_tokens, cols), torch.float32)
    if shared is not None:
        _check_like("moe_mlp", "shared", shared, (num_tokens, cols), torch.float32)
    if shared_gate is not None:
        _check_like("moe_mlp", "shared_gate", shared_gate, (num_tokens, 1), torch.float32)
    check(len(gate_up) in (1, 2), f"moe_mlp: {len(gate_up)} stacks of gate and up")
    for stack in (*gate_up, down):
        rows = stack.rows // num_experts
        check(
            stack.rows == rows * num_experts and rows % TILE_ROWS == 0,
            f"moe_mlp: a stack of {stack.rows} rows over {num_experts} experts; rows of an expert must be "
            f"a multiple of {TILE_ROWS}",
        )
    width = sum(stack.rows for stack in gate_up) // num_experts
    check(
        all(stack.cols == cols for stack in gate_up)
        and (down.cols * 2, down.rows) == (width, num_experts * cols)
        and len({stack.rows for stack in gate_up}) == 1,
        f"moe_mlp: stacks {[(s.rows, s.cols) for s in (*gate_up, down)]} do not fit x {tuple(x.shape)}",
    )
    optional = [0 if tensor is None else tensor.data_ptr() for tensor in (shared, shared_gate)]
    arguments: list[Any] = [x.data_ptr(), ids.data_ptr(), weights.data_ptr()]
    arguments += ([_view(stack) for stack in gate_up], [_view(down)], *optional, out.data_ptr())
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


def _view(weight: PackedWeight) -> _C.WeightView:
    return _C.WeightView(FORMAT_IDS[weight.format], weight.data.data_ptr(), weight.rows, weight.cols, 0)


def _check_like(op: str, name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(
        tuple(tensor.shape) == shape and tensor.dtype == dtype and tensor.is_contiguous(),
        f"{op}: {name} {tuple(tensor.shape)} {tensor.dtype} is not a contiguous {shape} {dtype}",
    )
