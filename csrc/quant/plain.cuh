// SPDX-License-Identifier: GPL-3.0-or-later
// Weights that are plain numbers, row-major on a device.
#pragma once

#include "core/cuda.cuh"
#include "quant/formats.h"

namespace helexa {

template <class F>
struct PlainNumber;
template <>
struct PlainNumber<F32> {
  using Type = float;
};
template <>
struct PlainNumber<F16> {
  using Type = __half;
};
template <>
struct PlainNumber<BF16> {
  using Type = __nv_bfloat16;
};

// Number i of a matrix of format F.
template <class F>
__device__ inline float plain_value(const uint8_t* numbers, int64_t i) {
  return to_float(reinterpret_cast<const typename PlainNumber<F>::Type*>(numbers)[i]);
}

}  // namespace helexa
