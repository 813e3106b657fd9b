// What the kernels for CPUs share: vectors, packed words, float16, and threads.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#if defined(__AVX2__) || defined(__F16C__)
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace jaxquant {

namespace ffi = xla::ffi;

#if defined(__AVX512F__)
constexpr int kLanes = 16, kRegisters = 32;
#else
constexpr int kLanes = 8, kRegisters = 16;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

// Compilers take the conversion of a vector of bytes apart, element by element; that of integers they know.
inline Ints Load(const uint8_t* bytes) {
#if defined(__AVX512F__)
  return reinterpret_cast<Ints>(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)bytes)));
#elif defined(__AVX2__)
  return reinterpret_cast<Ints>(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)bytes)));
#else
  Ints ints;
  for (int i = 0; i < kLanes; ++i) ints[i] = bytes[i];
  return ints;
#endif
}

// e^x for x <= 0, within 2 units in the last place; 0 where that is below the normal numbers.
template <typename F, typename I>
inline F Exp(F x) {
  // Adding this rounds to an integer, which the low bits then hold.
  constexpr float kRound = 0x1.8p23f;
  const F rounded = x * 0x1.715476p0f + kRound;
  const F n = rounded - kRound;
  const F r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
  F series = r * (1 / 5040.f) + 1 / 720.f;
  for (float term : {1 / 120.f, 1 / 24.f, 1 / 6.f, 0.5f, 1.f, 1.f}) series = series * r + term;
  I power;
  std::memcpy(&power, &rounded, sizeof(power));
  power = (power + 127) << 23;
  F scale;
  std::memcpy(&scale, &power, sizeof(scale));
  return x < -87.f ? F{} : series * scale;
}

template <typename F>
inline F Get(const float* source) {
  F floats;
  std::memcpy(&floats, source, sizeof(floats));
  return floats;
}

template <typename F>
inline void Put(F floats, float* target) {
  std::memcpy(target, &floats, sizeof(floats));
}

struct Plane {
  int bits, shift;
  int64_t depth;  // rows of words
};

// Planes of `rows` codes, as quant/packing.py lays them out.
inline std::vector<Plane> PlanesOf(int bits, int64_t rows) {
  std::vector<Plane> planes;
  int shift = 0;
  for (int width : {8, 4, 2, 1}) {
    if (bits & width) {
      planes.push_back({width, shift, (rows * width + 7) / 8});
      shift += width;
    }
  }
  return planes;
}

#if defined(__F16C__)
using Half = uint16_t;  // compilers of 2021 have no _Float16 for x86
inline float ToFloat(Half half) { return _cvtsh_ss(half); }
#else
using Half = _Float16;
inline float ToFloat(Half half) { return static_cast<float>(half); }
#endif

// float32 of `count` numbers from `offset` on: float16 if `half`, else float32.
inline void Widen(const void* source, bool half, int64_t offset, int64_t count, float* target) {
  if (!half) {
    std::memcpy(target, static_cast<const float*>(source) + offset, count * sizeof(float));
    return;
  }
  const Half* halves = static_cast<const Half*>(source) + offset;
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= count; i += 8) {
    const auto* eight = reinterpret_cast<const __m128i*>(halves + i);
    _mm256_storeu_ps(target + i, _mm256_cvtph_ps(_mm_loadu_si128(eight)));
  }
#endif
  for (; i < count; ++i) target[i] = ToFloat(halves[i]);
}

// Tasks for work that is worth `worthwhile` of them: more than threads, so that one that is interrupted does
// not hold up the others.
inline int64_t Parts(ffi::ThreadPool& pool, int64_t worthwhile) {
  const int64_t threads = std::max<int64_t>(1, pool.num_threads());
  return std::max<int64_t>(1, std::min(worthwhile, threads == 1 ? 1 : 4 * threads));
}

// Calls task(0) to task(count - 1) on the threads of the pool and this one, and returns when all are done.
// Threads take tasks until none is left. The caller takes part and waits for none that has not begun: the
// threads of XLA's pool may all be callers.
template <typename F>
void Run(ffi::ThreadPool& pool, int64_t count, const F& task) {
  struct Tasks {
    int64_t count;
    std::atomic<int64_t> next{0}, done{0};

    void Work(const F& task) {
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) {
        task(i);
        done.fetch_add(1, std::memory_order_release);
      }
    }
  };
  auto tasks = std::make_shared<Tasks>();
  tasks->count = count;
  const int64_t threads = std::max<int64_t>(1, pool.num_threads());
  for (int64_t i = 1; i < std::min(threads, count); ++i) {
    // `task` is only used by those who got one, and for these the caller waits.
    pool.Schedule([tasks, &task] { tasks->Work(task); });
  }
  tasks->Work(task);
  while (tasks->done.load(std::memory_order_acquire) < count) std::this_thread::yield();
}

}  // namespace jaxquant
