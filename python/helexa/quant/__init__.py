"""The tensor formats that helexa reads, one file each; adding one is one file and one line here."""

from helexa.quant import (
    bf16,
    f16,
    f32,
    iq4_nl,
    iq4_xs,
    q2_k,
    q3_k,
    q4_0,
    q4_1,
    q4_k,
    q5_0,
    q5_1,
    q5_k,
    q6_k,
    q8_0,
)
from helexa.quant.format import Format

FORMATS: dict[str, Format] = {
    module.FORMAT.name: module.FORMAT
    for module in (
        *(f32, f16, bf16),
        *(q8_0, q4_0, q4_1, q5_0, q5_1, iq4_nl),
        *(q2_k, q3_k, q4_k, q5_k, q6_k, iq4_xs),
    )
}

__all__ = ["FORMATS", "Format"]
