import torch

from helexa import ops


def test_it_appends_and_attends(assert_close):
    num_heads, num_kv_heads, head_dim = 4, 2, 64
    shape = (3, num_kv_heads, ops.PAGE_TOKENS, head_dim)
    k_cache, v_cache = torch.randn(shape), torch.randn(shape)
    positions = torch.tensor([299, 300, 5]).int()
    append = {
        "qkv": torch.randn(3, (num_heads + 2 * num_kv_heads) * head_dim),
        "table": ops.rope_table_reference(positions, 1e4 ** -(torch.arange(0, 64, 2) / 64)),
        "slots": torch.tensor([2 * 256 + 43, 2 * 256 + 44, 256 + 5]).int(),
        "num_heads": num_heads,
        "q_norm": torch.randn(head_dim),
        "k_norm": torch.randn(head_dim),
        "eps": 1e-6,
        "interleaved": False,
    }
    tables = {
        "page_table": torch.tensor([[0, 2], [1, 1]]).int(),
        "query_start": torch.tensor([0, 2, 3]).int(),
        "kv_lengths": torch.tensor([301, 6]).int(),
        "scale": head_dim**-0.5,
    }
    caches = {"k_cache": k_cache.clone(), "v_cache": v_cache.clone()}
    q = ops.rope_append_reference(**append, **caches)
    gate = torch.randn(2, num_heads * head_dim)
    expected = ops.attention_reference(q, **caches, **tables, gate=gate, rows=slice(1, 3))
    out = ops.rope_attention(
        **append, k_cache=k_cache, v_cache=v_cache, **tables, gate=gate, rows=slice(1, 3)
    )
    assert_close("attention", expected, out, 1e-5)
    assert_close("k", caches["k_cache"], k_cache, 1e-6)
    assert torch.equal(caches["v_cache"], v_cache)
