// Blocks of channels of x [rows, n] times Hadamard matrices, quantized group by group.
//
// y = x (H_m (x) H_2 (x) .. (x) H_2 (x) H_lanes) / sqrt(block)
// q = clamp(round((y - lo) / scale), 0, 2^bits - 1)
//
// The order of the factors is free. That of the lanes of a vector is a product with broadcast channels, which
// shuffles nothing; those of order 2 are butterflies of whole vectors; that of order m, which no doubling
// reaches, is a product with broadcast signs. A thread holds the channels of a unit, whole blocks and whole
// groups, and nothing else of y is ever written.

#include <cmath>
#include <limits>
#include <numeric>

#include "native.h"

namespace {

using namespace jaxquant;

// Channels of the widest vector, of which blocks and groups are multiples.
constexpr int kWidest = 16;
constexpr int kVectors = kWidest / kLanes;
// Channels below which another thread costs more than it saves.
constexpr int64_t kChannelsOfTask = 1 << 14;

struct Problem {
  const void* x;
  ffi::DataType dtype;
  const float* base;  // [m, m], signs
  uint8_t* codes;
  float *scale, *lo;
  int64_t m, block, group, unit;
  int bits;
  bool symmetric, zero, half;  // zero: in the range; half: scale and lo are rounded to float16
  float clip;
};

float Rounded(float x) {
  const float largest = 65504.f;
  if (std::isfinite(x)) x = std::min(std::max(x, -largest), largest);
#if defined(__F16C__)
  return ToFloat(_cvtss_sh(x, 0));
#else
  return ToFloat(static_cast<Half>(x));
#endif
}

// float32 of `count` channels from `offset` on, at their place or at `target`.
const float* Wide(const Problem& p, int64_t offset, int64_t count, float* target) {
  if (p.dtype == ffi::F32) return static_cast<const float*>(p.x) + offset;
  if (p.dtype == ffi::F16) {
    Widen(p.x, true, offset, count, target);
    return target;
  }
  const uint16_t* source = static_cast<const uint16_t*>(p.x) + offset;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = static_cast<uint32_t>(source[i]) << 16;
    std::memcpy(target + i, &bits, sizeof(bits));
  }
  return target;
}

// The factor of the order of the lanes, for kWidest channels at a time, times `norm`.
void TurnLanes(const float* source, int64_t count, float norm, float* target) {
  Floats rows[kLanes];
  for (int i = 0; i < kLanes; ++i)
    for (int j = 0; j < kLanes; ++j) rows[i][j] = __builtin_parity(i & j) ? -norm : norm;
  for (int64_t c = 0; c < count; c += kWidest) {
    Floats sums[kVectors] = {};
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sums[v] += source[c + v * kLanes + i] * rows[i];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) Put(sums[v], target + c + v * kLanes);
  }
}

// log2(kRadix) factors of order 2, from that of `stride` channels on.
template <int kRadix>
void Butterflies(float* y, int64_t count, int64_t stride) {
  for (int64_t first = 0; first < count; first += kRadix * stride) {
    for (float* own = y + first; own < y + first + stride; own += kLanes) {
      Floats v[kRadix];
#pragma GCC unroll 8
      for (int i = 0; i < kRadix; ++i) v[i] = Get<Floats>(own + i * stride);
#pragma GCC unroll 3
      for (int half = 1; half < kRadix; half *= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < kRadix; ++i) {
          if (i & half) continue;
          const Floats sum = v[i] + v[i + half];
          v[i + half] = v[i] - v[i + half];
          v[i] = sum;
        }
      }
#pragma GCC unroll 8
      for (int i = 0; i < kRadix; ++i) Put(v[i], own + i * stride);
    }
  }
}

// The factor of order m.
void TurnBase(const Problem& p, const float* source, float* target) {
  constexpr int kOut = 4;  // divides every such m
  const int64_t stride = p.block / p.m;
  for (int64_t c = 0; c < stride; c += kWidest) {
    for (int64_t j = 0; j < p.m; j += kOut) {
      Floats sums[kOut][kVectors] = {};
      for (int64_t i = 0; i < p.m; ++i) {
#pragma GCC unroll 4
        for (int k = 0; k < kOut; ++k)
#pragma GCC unroll 2
          for (int v = 0; v < kVectors; ++v)
            sums[k][v] += p.base[i * p.m + j + k] * Get<Floats>(source + i * stride + c + v * kLanes);
      }
#pragma GCC unroll 4
      for (int k = 0; k < kOut; ++k)
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) Put(sums[k][v], target + (j + k) * stride + c + v * kLanes);
    }
  }
}

void Turn(const Problem& p, const float* x, float* scratch, float* y) {
  float* doubled = p.m > 1 ? scratch : y;
  TurnLanes(x, p.block, 1 / std::sqrt(static_cast<float>(p.block)), doubled);
  const int64_t end = p.block / p.m;
  int64_t stride = kLanes;
  for (; 8 * stride <= end; stride *= 8) Butterflies<8>(doubled, p.block, stride);
  if (4 * stride == end) Butterflies<4>(doubled, p.block, stride);
  if (2 * stride == end) Butterflies<2>(doubled, p.block, stride);
  if (p.m > 1) TurnBase(p, scratch, y);
}

inline void PutCodes(Ints codes, uint8_t* target) {
#if defined(__AVX512F__)
  _mm_storeu_si128((__m128i*)target, _mm512_cvtepi32_epi8((__m512i)codes));
#elif defined(__AVX2__)
  const __m256i wide = (__m256i)codes;
  const __m128i pairs = _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  _mm_storel_epi64((__m128i*)target, _mm_packus_epi16(pairs, pairs));
#else
  for (int i = 0; i < kLanes; ++i) target[i] = static_cast<uint8_t>(codes[i]);
#endif
}

// The range of a group, as `ActivationGrid.fit` finds it; NaN where a channel is no number.
void Fit(const Problem& p, const float* y, float& scale, float& lo) {
  Floats least[kVectors], most[kVectors], bad = {};
  for (int v = 0; v < kVectors; ++v) least[v] = most[v] = Get<Floats>(y + v * kLanes);
  for (int64_t c = 0; c < p.group; c += kWidest) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      const Floats own = Get<Floats>(y + c + v * kLanes);
      least[v] = own < least[v] ? own : least[v];
      most[v] = own > most[v] ? own : most[v];
      bad += own - own;
    }
  }
  float low = least[0][0], high = most[0][0], sum = 0;
  for (int i = 0; i < kWidest; ++i) {
    low = std::min(low, least[i / kLanes][i % kLanes]);
    high = std::max(high, most[i / kLanes][i % kLanes]);
  }
  for (int i = 0; i < kLanes; ++i) sum += bad[i];
  const int top = (1 << p.bits) - 1;
  if (p.symmetric) {
    scale = p.clip * std::max(-low, high) / (top / 2);
  } else {
    if (p.zero) {
      low = p.clip * std::min(low, 0.f);
      high = p.clip * std::max(high, 0.f);
    } else {
      const float middle = (low + high) / 2, half = p.clip * (high - low) / 2;
      low = middle - half;
      high = middle + half;
    }
    scale = (high - low) / top;
  }
  if (sum != 0) scale = low = std::numeric_limits<float>::quiet_NaN();
  if (p.half) {
    scale = Rounded(scale);
    low = Rounded(low);
  }
  lo = p.symmetric ? -scale * (1 << (p.bits - 1)) : low;
}

void Quantize(const Problem& p, const float* y, float scale, float lo, uint8_t* codes) {
  // Adding this rounds to an integer, which the low bits then hold.
  constexpr float kRound = 0x1p23f;
  const float top = static_cast<float>((1 << p.bits) - 1), step = scale == 0 ? 1 : scale;
  for (int64_t c = 0; c < p.group; c += kLanes) {
    Floats place = (Get<Floats>(y + c) - lo) / step;
    place = place > 0 ? place : Floats{};  // and where it is NaN
    place = place < top ? place : Floats{} + top;
    PutCodes((Ints)(place + kRound) & 255, codes + c);
  }
}

void Units(const Problem& p, int64_t first, int64_t last) {
  std::vector<float> wide(p.unit), scratch(p.block), y(p.unit);
  const int64_t groups = p.unit / p.group;
  for (int64_t i = first; i < last; ++i) {
    const float* x = Wide(p, i * p.unit, p.unit, wide.data());
    for (int64_t c = 0; c < p.unit; c += p.block) Turn(p, x + c, scratch.data(), &y[c]);
    for (int64_t g = 0; g < groups; ++g) {
      float &scale = p.scale[i * groups + g], &lo = p.lo[i * groups + g];
      Fit(p, &y[g * p.group], scale, lo);
      Quantize(p, &y[g * p.group], scale, lo, p.codes + i * p.unit + g * p.group);
    }
  }
}

ffi::Error HadamardQuantize(ffi::ThreadPool pool, int64_t block, int64_t bits, int64_t symmetric, int64_t zero,
                            int64_t half, float clip, ffi::AnyBuffer x, ffi::Buffer<ffi::F32> base,
                            ffi::ResultBuffer<ffi::U8> codes, ffi::ResultBuffer<ffi::F32> scale,
                            ffi::ResultBuffer<ffi::F32> lo) {
  Problem p;
  p.x = x.untyped_data();
  p.dtype = x.element_type();
  p.base = base.typed_data();
  p.codes = codes->typed_data();
  p.scale = scale->typed_data();
  p.lo = lo->typed_data();
  p.m = base.dimensions()[0];
  p.block = block;
  p.group = x.dimensions()[1] / scale->dimensions()[1];
  p.unit = std::lcm(p.block, p.group);
  p.bits = static_cast<int>(bits);
  p.symmetric = symmetric != 0;
  p.zero = zero != 0;
  p.half = half != 0;
  p.clip = clip;

  const int64_t channels = x.dimensions()[0] * x.dimensions()[1], units = channels / p.unit;
  const int64_t parts = std::min(std::max<int64_t>(1, units), Parts(pool, channels / kChannelsOfTask));
  Run(pool, parts, [&](int64_t i) { Units(p, i * units / parts, (i + 1) * units / parts); });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxquantHadamardQuantize, HadamardQuantize,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<int64_t>("block")
                                  .Attr<int64_t>("bits")
                                  .Attr<int64_t>("symmetric")
                                  .Attr<int64_t>("zero")
                                  .Attr<int64_t>("half")
                                  .Attr<float>("clip")
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::U8>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
