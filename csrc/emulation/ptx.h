// SPDX-License-Identifier: GPL-3.0-or-later
#pragma once

// core/ptx.cuh for runs on the host; it documents the functions.
#include <chrono>
#include <cstdlib>

#include "emulation/cuda.h"

namespace helexa::ptx {

inline void wait_for_producers() {}
inline void allow_consumers() {}

inline bool is_last_arrival(uint32_t* counter, uint32_t last) { return atomicInc(counter, last) == last; }

template <class T>
T load_aligned(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T) != 0) emulation::trap("a misaligned load");
  T value;
  std::memcpy(&value, p, sizeof(T));
  return value;
}
inline uint4 load_once(const void* p) { return load_aligned<uint4>(p); }
inline uint2 load_once_8(const void* p) { return load_aligned<uint2>(p); }
inline uint32_t load_once_4(const void* p) { return load_aligned<uint32_t>(p); }

inline void load_fresh(uint4& v, const void* p) { v = load_aligned<uint4>(p); }
inline void load_fresh(uint2& v, const void* p) { v = load_aligned<uint2>(p); }

inline void prefetch(const void*) {}

inline void copy_async(void* shared, const void* global, bool valid = true) {
  emulation::copy_later(shared, global, valid);
}
inline void commit_copies() { emulation::end_copy_group(); }
template <int kPending>
void wait_for_copies() {
  emulation::finish_copies(kPending);
}

// Both ways of copying are there, so that both are tested: HELEXA_EMULATION_BULK=0 is a device without bulk copies.
inline bool has_bulk_copies() {
  static const char* wanted = std::getenv("HELEXA_EMULATION_BULK");
  return wanted == nullptr || wanted[0] != '0';
}
inline void make_copy_barrier(uint64_t* barrier) { *barrier = 0; }
inline void copy_bulk(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0 || reinterpret_cast<uintptr_t>(global) % 16 != 0 ||
      bytes % 16 != 0) {
    emulation::trap("a misaligned bulk copy");
  }
  std::memcpy(shared, global, bytes);
  ++*barrier;
}
inline void wait_for_bulk(uint64_t* barrier, uint32_t parity) {
  if (*barrier % 2 == parity) emulation::trap("a wait for a copy that nobody has started");
}

template <int kCount, bool kTransposed>
void load_matrices_any(uint32_t (&r)[kCount], const void* shared) {
  const auto addresses = emulation::gather(0xffffffffu, shared);
  const int lane = emulation::lane();
  for (int m = 0; m < kCount; ++m) {
    uint16_t pair[2];
    for (int i = 0; i < 2; ++i) {
      const int row = kTransposed ? 2 * (lane % 4) + i : lane / 4;
      const int column = kTransposed ? lane / 4 : 2 * (lane % 4) + i;
      const void* address = addresses.value[8 * m + row];
      if (reinterpret_cast<uintptr_t>(address) % 16 != 0) emulation::trap("a misaligned row of a matrix");
      std::memcpy(&pair[i], static_cast<const uint16_t*>(address) + column, 2);
    }
    std::memcpy(&r[m], pair, 4);
  }
}
inline void load_matrices(uint32_t (&r)[4], const void* shared) { load_matrices_any<4, false>(r, shared); }
inline void load_matrices(uint32_t (&r)[2], const void* shared) { load_matrices_any<2, false>(r, shared); }
inline void load_matrices_transposed(uint32_t (&r)[4], const void* shared) {
  load_matrices_any<4, true>(r, shared);
}
inline void load_matrices_transposed(uint32_t (&r)[2], const void* shared) {
  load_matrices_any<2, true>(r, shared);
}

inline uint32_t transpose(uint32_t x) {
  const auto held = emulation::gather(0xffffffffu, x);
  const int lane = emulation::lane(), shift = lane / 4 % 2 * 16;
  auto at = [&](int row) { return held.value[4 * row + lane / 8] >> shift & 0xffffu; };
  return at(lane % 4 * 2) | at(lane % 4 * 2 + 1) << 16;
}

// The 16 x 8 product of the operands that the lanes hold.  kPerWord values lie in a register; kWords of them, by row pair and then
// by half of the depth, make a lane's part of a.
template <class Sum, class Value, int kPerWord, int kAWords, int kBWords>
void mma_any(Sum (&d)[4], const uint32_t (&a)[kAWords], const uint32_t (&b)[kBWords]) {
  struct Operands {
    Sum d[4];
    uint32_t a[kAWords], b[kBWords];
  };
  Operands in;
  std::memcpy(in.d, d, sizeof(in.d));
  std::memcpy(in.a, a, sizeof(in.a));
  std::memcpy(in.b, b, sizeof(in.b));
  struct Result {
    Sum d[4];
  } out;
  emulation::meet(
      0xffffffffu, &in, sizeof(in),
      [](const unsigned char* from, unsigned char* to) {
        constexpr int kDepth = 4 * kPerWord * kBWords;
        Sum left[16][kDepth], right[kDepth][8];
        for (int l = 0; l < 32; ++l) {
          const auto& lane = emulation::slot<Operands>(from, l);
          const int g = l / 4, t = l % 4;
          for (int w = 0; w < kAWords; ++w) {
            Value values[kPerWord];
            std::memcpy(values, &lane.a[w], 4);
            for (int i = 0; i < kPerWord; ++i) {
              left[g + 8 * (w % 2)][(w / 2) * 4 * kPerWord + t * kPerWord + i] = static_cast<Sum>(values[i]);
            }
          }
          for (int w = 0; w < kBWords; ++w) {
            Value values[kPerWord];
            std::memcpy(values, &lane.b[w], 4);
            for (int i = 0; i < kPerWord; ++i)
              right[w * 4 * kPerWord + t * kPerWord + i][g] = static_cast<Sum>(values[i]);
          }
        }
        for (int l = 0; l < 32; ++l) {
          const auto& lane = emulation::slot<Operands>(from, l);
          auto& result = emulation::slot<Result>(to, l);
          for (int i = 0; i < 4; ++i) {
            Sum sum = lane.d[i];
            const int row = l / 4 + 8 * (i / 2), column = 2 * (l % 4) + i % 2;
            for (int k = 0; k < kDepth; ++k) sum += left[row][k] * right[k][column];
            result.d[i] = sum;
          }
        }
      },
      &out, sizeof(out));
  std::memcpy(d, out.d, sizeof(out.d));
}

struct Tf32 {
  uint32_t bits;
  operator float() const {  // the hardware reads 19 of the bits
    const uint32_t kept = bits & 0xffffe000u;
    float x;
    std::memcpy(&x, &kept, 4);
    return x;
  }
};

inline void mma_s8(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma_any<int, int8_t, 4>(d, a, b);
}
inline void mma_s8(int (&d)[4], const uint32_t (&a)[2], uint32_t b) {
  const uint32_t whole[1] = {b};
  mma_any<int, int8_t, 4>(d, a, whole);
}
inline void mma_s8(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const int (&start)[4]) {
  std::copy(start, start + 4, d);
  mma_any<int, int8_t, 4>(d, a, b);
}
inline void mma_s8(int (&d)[4], const uint32_t (&a)[2], uint32_t b, const int (&start)[4]) {
  std::copy(start, start + 4, d);
  mma_s8(d, a, b);
}
inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma_any<float, __nv_bfloat16, 2>(d, a, b);
}
inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma_any<float, __half, 2>(d, a, b);
}
inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma_any<float, Tf32, 1>(d, a, b);
}

inline uint32_t to_tf32(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return (bits + 0x1000u) & 0xffffe000u;  // to nearest, ties away from zero
}

inline float exp2_fast(float x) { return x < -126.0f ? 0.0f : std::exp2(x); }

inline int opaque(int x) { return x; }

inline uint64_t global_ns() {
  return static_cast<uint64_t>(std::chrono::steady_clock::now().time_since_epoch().count());
}

}  // namespace helexa::ptx
