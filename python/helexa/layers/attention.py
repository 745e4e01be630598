"""Causal self-attention with grouped key/value heads over a paged cache."""

from torch import Tensor

from helexa import ops
from helexa.layers.linear import Linear, Scope
from helexa.layers.norm import RMSNorm
from helexa.layers.step import Step
from helexa.ops import Rows


class Attention:
    """o_proj(attention(q, cache)); q, k and v come from one matmul, k and v go to the layer's cache.

    With an output gate, o_proj sees attention · sigmoid(gate).
    """

    def __init__(
        self,
        scope: Scope,
        layer_index: int,
        *,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        scale: float,
        rope_interleaved: bool,
        bias: bool,
        qk_norm: bool,
        eps: float,
        output_gate: bool = False,
    ):
        self.layer_index = layer_index
        self.num_heads = num_heads
        self.scale = scale
        self.rope_interleaved = rope_interleaved
        kv_rows = {"k_proj": num_kv_heads * head_dim, "v_proj": num_kv_heads * head_dim}
        self.gate_proj = None
        if output_gate:  # q_proj has for each head the rows of q and then those of the gate
            q_blocks, gate_blocks = (
                tuple(
                    (start + head * 2 * head_dim, start + (head * 2 + 1) * head_dim)
                    for head in range(num_heads)
                )
                for start in (0, head_dim)
            )
            q, gate = (
                scope.matrix("q_proj", num_heads * head_dim, hidden_size, blocks)
                for blocks in (q_blocks, gate_blocks)
            )
            kv = Linear.load(scope, hidden_size, kv_rows, bias=bias)
            q_bias, gate_bias = _biases(scope, num_heads, head_dim)
            biases = [q_bias, *(kv.biases or [None, None])]
            self.qkv_proj = Linear([q, *kv.weights], biases)
            self.gate_proj = Linear([gate], [gate_bias])
            self.qkv_gate_proj = Linear([q, *kv.weights, gate], [*biases, gate_bias])
        else:
            rows = {"q_proj": num_heads * head_dim, **kv_rows}
            self.qkv_proj = Linear.load(scope, hidden_size, rows, bias=bias)
        self.eps = eps
        self.q_norm = self.k_norm = None
        if qk_norm:
            self.q_norm = scope.vector("q_norm.weight", head_dim)
            self.k_norm = scope.vector("k_norm.weight", head_dim)
        self.o_proj = Linear.load(scope, num_heads * head_dim, {"o_proj": hidden_size})

    def __call__(
        self, x: Rows, rope: Tensor, step: Step, rows: slice, residual: Tensor, norm: RMSNorm
    ) -> Rows:
        """Adds the output of the given rows of x [T, hidden_size] to residual, and the norm of that.

        residual: [R, hidden_size], of these rows; keys and values of all T rows are appended.
        """
        k_cache, v_cache = step.k_cache[self.layer_index], step.v_cache[self.layer_index]
        qkv, gate = self._project(x, rows)
        out = ops.rope_attention(
            qkv,  # [T, (H + 2·Hkv)·D]
            rope,
            step.slots,
            k_cache,
            v_cache,
            step.page_table,
            step.query_start,
            step.kv_lengths,
            self.scale,
            num_heads=self.num_heads,
            q_norm=self.q_norm,
            k_norm=self.k_norm,
            eps=self.eps,
            interleaved=self.rope_interleaved,
            gate=gate,
            rows=rows,
        )  # [R, H·D]
        return norm.after(self.o_proj, out, residual)

    def _project(self, x: Rows, rows: slice) -> tuple[Tensor, Tensor | None]:
        """qkv [T, (H + 2·Hkv)·D] and the gate [R, H·D] of the given rows, if there is one."""
        if self.gate_proj is None:
            return self.qkv_proj(x), None
        if isinstance(x, ops.Activation) and x.q8 is not None:
            # While decoding, a launch costs more than the gates of rows that are not wanted.
            both = self.qkv_gate_proj(x)
            width = self.o_proj.weights[0].cols
            return both[:, :-width], both[rows, -width:]
        return self.qkv_proj(x), self.gate_proj(x[rows])


def _biases(scope: Scope, num_heads: int, head_dim: int) -> tuple[Tensor | None, Tensor | None]:
    """The biases of q and of the gate, which lie as their rows do, if the file has them."""
    if "q_proj.bias" not in scope:
        return None, None
    both = scope.vector("q_proj.bias", num_heads * 2 * head_dim).view(num_heads, 2, head_dim)
    return both[:, 0].flatten(), both[:, 1].flatten()
