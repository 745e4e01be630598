// SPDX-License-Identifier: GPL-3.0-or-later
#pragma once

// CUDA kernels on the host, for tests on machines without a device: a .cu file compiled as C++ with HELEXA_EMULATED_CUDA.
// Every CUDA thread is a fiber; a warp's collectives and a block's barriers switch between them; blocks run one after the other.
// What hangs on a device is an error here: a barrier that not all reach, a shuffle that waits for a lane which has ended.
// HELEXA_EMULATION_SEED, an integer, runs warps and lanes in another order, so that a missing barrier changes the result.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

namespace helexa::emulation {

extern thread_local uint3 thread_index, block_index;
extern thread_local dim3 block_size, grid_size;

// Runs `thread` for every thread of every block.  Throws CudaError where a device would trap or never end.
void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread);

void* dynamic_shared();
void sync_block();
// The barrier of a block that also counts the threads whose `value` is not 0.
int count_block(int value);
[[noreturn]] void trap(const char* reason);
int lane();

// The lanes of `mask` meet: each leaves `bytes` at `in`, the last one to come runs `combine`, and each gets its part of the result.
// combine(in, out) sees 32 slots of 256 bytes each.
constexpr int kSlot = 256;
using Combine = void (*)(const unsigned char* in, unsigned char* out);
void meet(unsigned mask, const void* in, size_t in_bytes, Combine combine, void* out, size_t out_bytes);

// Deferred copies of this thread, done when they are waited for.
void copy_later(void* to, const void* from, bool valid);
void end_copy_group();
void finish_copies(int pending_groups);

template <class T>
const T& slot(const unsigned char* slots, int lane) {
  return *reinterpret_cast<const T*>(slots + lane * kSlot);
}
template <class T>
T& slot(unsigned char* slots, int lane) {
  return *reinterpret_cast<T*>(slots + lane * kSlot);
}

// All lanes' values, as each lane of the mask sees them.
template <class T>
struct Lanes {
  T value[32];
};
template <class T>
Lanes<T> gather(unsigned mask, T value) {
  static_assert(sizeof(T) <= 8);
  struct Wide {
    unsigned char bytes[8];
  };
  Wide in = {};
  std::memcpy(&in, &value, sizeof(T));
  Wide all[32];
  meet(
      mask, &in, sizeof(Wide),
      [](const unsigned char* from, unsigned char* to) {
        for (int l = 0; l < 32; ++l) {
          for (int k = 0; k < 32; ++k) std::memcpy(to + l * kSlot + k * 8, from + k * kSlot, 8);
        }
      },
      all, sizeof(all));
  Lanes<T> lanes;
  for (int k = 0; k < 32; ++k) std::memcpy(&lanes.value[k], &all[k], sizeof(T));
  return lanes;
}

}  // namespace helexa::emulation

#define threadIdx (::helexa::emulation::thread_index)
#define blockIdx (::helexa::emulation::block_index)
#define blockDim (::helexa::emulation::block_size)
#define gridDim (::helexa::emulation::grid_size)
#define warpSize 32
#undef __shared__
#define __shared__ static
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __global__
#define __global__
#undef __device__
#define __device__
#undef __host__
#define __host__
#undef __forceinline__
#define __forceinline__ inline
#undef __constant__
#define __constant__ static
#undef __grid_constant__
#define __grid_constant__
#undef __noinline__
#define __noinline__

// --- barriers and warps ----------------------------------------------------------------------------------------------------------
inline void __syncthreads() { helexa::emulation::sync_block(); }
inline int __syncthreads_count(int value) { return helexa::emulation::count_block(value); }
inline int __syncthreads_or(int value) { return helexa::emulation::count_block(value) != 0; }
inline int __syncthreads_and(int value) { return helexa::emulation::count_block(!value) == 0; }
inline void __syncwarp(unsigned mask = 0xffffffffu) { helexa::emulation::gather(mask, 0); }
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
inline void __trap() { helexa::emulation::trap("__trap()"); }
inline void __nanosleep(unsigned) {}
inline long long clock64() { return 0; }

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int lane = helexa::emulation::lane();
  return helexa::emulation::gather(mask, value).value[(lane & ~(width - 1)) | (source & (width - 1))];
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  const int lane = helexa::emulation::lane(), other = lane ^ bits;
  const auto all = helexa::emulation::gather(mask, value);
  return all.value[(other & ~(width - 1)) <= (lane & ~(width - 1)) ? other : lane];
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = helexa::emulation::lane();
  const auto all = helexa::emulation::gather(mask, value);
  return all.value[(lane & (width - 1)) + static_cast<int>(delta) < width ? lane + delta : lane];
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = helexa::emulation::lane();
  const auto all = helexa::emulation::gather(mask, value);
  return all.value[(lane & (width - 1)) >= static_cast<int>(delta) ? lane - delta : lane];
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const auto all = helexa::emulation::gather(mask, predicate);
  unsigned votes = 0;
  for (int l = 0; l < 32; ++l) votes |= ((mask >> l & 1) && all.value[l] ? 1u : 0u) << l;
  return votes;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }
inline unsigned __activemask() { return 0xffffffffu; }
template <class T>
unsigned __match_any_sync(unsigned mask, T value) {
  const auto all = helexa::emulation::gather(mask, value);
  unsigned same = 0;
  for (int l = 0; l < 32; ++l) same |= ((mask >> l & 1) && all.value[l] == value ? 1u : 0u) << l;
  return same;
}
template <class T, class F>
T helexa_reduce(unsigned mask, T value, F f) {
  const auto all = helexa::emulation::gather(mask, value);
  bool first = true;
  T result{};
  for (int l = 0; l < 32; ++l) {
    if (!(mask >> l & 1)) continue;
    result = first ? all.value[l] : f(result, all.value[l]);
    first = false;
  }
  return result;
}
template <class T>
T __reduce_add_sync(unsigned mask, T value) {
  return helexa_reduce(mask, value, [](T a, T b) { return a + b; });
}
template <class T>
T __reduce_max_sync(unsigned mask, T value) {
  return helexa_reduce(mask, value, [](T a, T b) { return std::max(a, b); });
}
template <class T>
T __reduce_min_sync(unsigned mask, T value) {
  return helexa_reduce(mask, value, [](T a, T b) { return std::min(a, b); });
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value) {
  return helexa_reduce(mask, value, [](unsigned a, unsigned b) { return a | b; });
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned value) {
  return helexa_reduce(mask, value, [](unsigned a, unsigned b) { return a & b; });
}

// --- atomics: only one thread runs at a time ---------------------------------------------------------------------------------------
template <class T, class V>
T atomicAdd(T* p, V value) {
  const T old = *p;
  *p = static_cast<T>(old + static_cast<T>(value));
  return old;
}
template <class T, class V>
T atomicSub(T* p, V value) {
  const T old = *p;
  *p = static_cast<T>(old - static_cast<T>(value));
  return old;
}
template <class T, class V>
T atomicExch(T* p, V value) {
  const T old = *p;
  *p = static_cast<T>(value);
  return old;
}
template <class T, class V>
T atomicMax(T* p, V value) {
  const T old = *p;
  *p = std::max(old, static_cast<T>(value));
  return old;
}
template <class T, class V>
T atomicMin(T* p, V value) {
  const T old = *p;
  *p = std::min(old, static_cast<T>(value));
  return old;
}
template <class T, class V>
T atomicOr(T* p, V value) {
  const T old = *p;
  *p = old | static_cast<T>(value);
  return old;
}
template <class T, class V>
T atomicAnd(T* p, V value) {
  const T old = *p;
  *p = old & static_cast<T>(value);
  return old;
}
template <class T, class V>
T atomicXor(T* p, V value) {
  const T old = *p;
  *p = old ^ static_cast<T>(value);
  return old;
}
template <class T, class V, class W>
T atomicCAS(T* p, V compare, W value) {
  const T old = *p;
  if (old == static_cast<T>(compare)) *p = static_cast<T>(value);
  return old;
}
inline unsigned atomicInc(unsigned* p, unsigned limit) {
  const unsigned old = *p;
  *p = old >= limit ? 0 : old + 1;
  return old;
}

// --- memory ----------------------------------------------------------------------------------------------------------------------
template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
T __ldcv(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, T value) {
  *p = value;
}
template <class T>
void __stcg(T* p, T value) {
  *p = value;
}
template <class T>
void __stwt(T* p, T value) {
  *p = value;
}

// --- numbers ---------------------------------------------------------------------------------------------------------------------
using std::max;
using std::min;
template <class A, class B, class = std::enable_if_t<!std::is_same_v<A, B>>>
std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}
template <class A, class B, class = std::enable_if_t<!std::is_same_v<A, B>>>
std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __exp2f(float x) { return std::exp2(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __powf(float x, float y) { return std::pow(x, y); }
inline float __sinf(float x) { return std::sin(x); }
inline float __cosf(float x) { return std::cos(x); }
inline float __tanhf(float x) { return std::tanh(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __frsqrt_rn(float x) { return 1.0f / std::sqrt(x); }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline double __dadd_rn(double x, double y) { return x + y; }
inline double __dmul_rn(double x, double y) { return x * y; }
inline double __fma_rn(double x, double y, double z) { return std::fma(x, y, z); }
inline float __saturatef(float x) { return x > 0 ? (x < 1 ? x : 1.0f) : 0.0f; }
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }
inline int __float2int_rz(float x) { return static_cast<int>(x); }
inline int __float2int_rd(float x) { return static_cast<int>(std::floor(x)); }
inline unsigned __float2uint_rn(float x) { return static_cast<unsigned>(std::nearbyint(x)); }
inline unsigned __float2uint_rz(float x) { return static_cast<unsigned>(x); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }
inline float __double2float_rn(double x) { return static_cast<float>(x); }
inline double __ull2double_rn(unsigned long long x) { return static_cast<double>(x); }
template <class To, class From>
To helexa_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}
inline int __float_as_int(float x) { return helexa_bits<int>(x); }
inline unsigned __float_as_uint(float x) { return helexa_bits<unsigned>(x); }
inline float __int_as_float(int x) { return helexa_bits<float>(x); }
inline float __uint_as_float(unsigned x) { return helexa_bits<float>(x); }
inline long long __double_as_longlong(double x) { return helexa_bits<long long>(x); }
inline double __longlong_as_double(long long x) { return helexa_bits<double>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
  unsigned y = 0;
  for (int i = 0; i < 32; ++i) y |= (x >> i & 1) << (31 - i);
  return y;
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>((static_cast<unsigned long long>(a) * b) >> 32);
}
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>((static_cast<unsigned __int128>(a) * b) >> 64);
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>(((static_cast<unsigned long long>(high) << 32 | low) << (shift & 31)) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((static_cast<unsigned long long>(high) << 32 | low) >> (shift & 31));
}
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const unsigned long long bytes = static_cast<unsigned long long>(high) << 32 | low;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned choice = selector >> (4 * i) & 15;
    unsigned byte = static_cast<unsigned>(bytes >> (8 * (choice & 7))) & 255;
    if (choice & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << (8 * i);
  }
  return result;
}
inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; ++i) c += static_cast<int8_t>(a >> (8 * i)) * static_cast<int8_t>(b >> (8 * i));
  return c;
}
template <class F>
unsigned helexa_bytewise(unsigned a, unsigned b, F f) {
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= static_cast<unsigned>(static_cast<uint8_t>(f(a >> (8 * i) & 255, b >> (8 * i) & 255)))
              << (8 * i);
  }
  return result;
}
inline unsigned __vadd4(unsigned a, unsigned b) {
  return helexa_bytewise(a, b, [](unsigned x, unsigned y) { return x + y; });
}
inline unsigned __vsub4(unsigned a, unsigned b) {
  return helexa_bytewise(a, b, [](unsigned x, unsigned y) { return x - y; });
}
inline unsigned __vsubss4(unsigned a, unsigned b) {
  return helexa_bytewise(a, b, [](unsigned x, unsigned y) {
    const int z = static_cast<int8_t>(x) - static_cast<int8_t>(y);
    return static_cast<unsigned>(std::clamp(z, -128, 127));
  });
}
inline unsigned __vcmpne4(unsigned a, unsigned b) {
  return helexa_bytewise(a, b, [](unsigned x, unsigned y) { return x != y ? 255u : 0u; });
}
inline unsigned __vcmpeq4(unsigned a, unsigned b) {
  return helexa_bytewise(a, b, [](unsigned x, unsigned y) { return x == y ? 255u : 0u; });
}
