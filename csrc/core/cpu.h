// SPDX-License-Identifier: GPL-3.0-or-later
#pragma once

namespace helexa {

// Instruction sets that kernels are compiled for, each a superset of the one before.
enum class Isa { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Vnni = 3 };

// The best instruction set of this machine, or the lower one asked for with limit_isa (tests).
Isa cpu_isa();
void limit_isa(Isa highest);
const char* isa_name(Isa isa);
bool has_avx512_bf16();

}  // namespace helexa

// Declares `R name(args)` once in each instruction set's namespace, and defines `inline pick_name()`, which returns the copy
// for this machine.  A kernel in <op>_isa.cpp defines it inside `namespace helexa::HELEXA_ISA`.
#if defined(HELEXA_WITH_avx2) || defined(HELEXA_ISA_avx2) || defined(__x86_64__)
#define HELEXA_ISA_KERNEL(R, name, ...)               \
  namespace portable {                                \
  R name(__VA_ARGS__);                                \
  }                                                   \
  namespace avx2 {                                    \
  R name(__VA_ARGS__);                                \
  }                                                   \
  namespace avx512 {                                  \
  R name(__VA_ARGS__);                                \
  }                                                   \
  namespace avx512vnni {                              \
  R name(__VA_ARGS__);                                \
  }                                                   \
  inline auto pick_##name() -> R (*)(__VA_ARGS__) {   \
    switch (cpu_isa()) {                              \
      case Isa::kAvx512Vnni: return avx512vnni::name; \
      case Isa::kAvx512: return avx512::name;         \
      case Isa::kAvx2: return avx2::name;             \
      default: return portable::name;                 \
    }                                                 \
  }
#else
#define HELEXA_ISA_KERNEL(R, name, ...) \
  namespace portable {                  \
  R name(__VA_ARGS__);                  \
  }                                     \
  inline auto pick_##name() -> R (*)(__VA_ARGS__) { return portable::name; }
#endif
