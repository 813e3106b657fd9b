// Attention of few tokens q [batch, tokens, heads, n] over packed keys and values [batch, places, kv_heads,
// words], scales and offsets [batch, places, kv_heads, groups].
//
// score[r, s] = sum_g scale[s, g] (q[r, g] . code[s, g]) + lo[s, g] sum(q[r, g])
// y[r, g] = sum_s weight[r, s] scale[s, g] code[s, g] + sum_s weight[r, s] lo[s, g]
//
// A tile of places is read for all heads at once, since their words lie side by side; nothing but their codes
// is written down, a byte each, one head at a time. The queries that share a head of the cache are rows, four
// of them the lanes of a vector of scores.

#include <limits>

#include "native.h"

namespace {

using namespace jaxquant;

typedef float Rows __attribute__((vector_size(16)));
typedef int32_t RowInts __attribute__((vector_size(16)));

constexpr int kRows = 4;
// Places of a tile: their words and codes stay in the first cache.
constexpr int64_t kTile = 64;
// Bytes that rows of codes are padded to.
constexpr int64_t kPadding = 16;
// Products below which another thread costs more than it saves.
constexpr int64_t kProductsOfTask = 1 << 18;
constexpr float kLowest = std::numeric_limits<float>::lowest();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

inline Floats LoadCodes(const uint8_t* codes) { return __builtin_convertvector(Load(codes), Floats); }

// The sums of all lanes of up to four vectors.
inline Rows SumLanes(const Floats (&v)[kRows]) {
#if defined(__AVX2__)
  __m128 quarter[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#if defined(__AVX512F__)
    const __m512 whole = reinterpret_cast<__m512>(v[r]);
    const __m256 upper = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(whole), 1));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(whole), upper);
#else
    const __m256 half = reinterpret_cast<__m256>(v[r]);
#endif
    quarter[r] = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  }
  return reinterpret_cast<Rows>(
      _mm_hadd_ps(_mm_hadd_ps(quarter[0], quarter[1]), _mm_hadd_ps(quarter[2], quarter[3])));
#else
  Rows sums = {};
  for (int r = 0; r < kRows; ++r)
    for (int i = 0; i < kLanes; ++i) sums[r] += v[r][i];
  return sums;
#endif
}

// Keys or values.
struct Store {
  const uint8_t* words;
  const void *scale, *lo;
  bool half, symmetric;  // scale and lo are float16, else float32
  int bits;
  int64_t words_of_head, groups;
  std::vector<Plane> planes;

  Store(int64_t bits, int64_t symmetric, int64_t n, const ffi::Buffer<ffi::U8>& words,
        const ffi::AnyBuffer& scale, const ffi::AnyBuffer& lo)
      : words(words.typed_data()),
        scale(scale.untyped_data()),
        lo(lo.untyped_data()),
        half(scale.element_type() == ffi::F16),
        symmetric(symmetric != 0),
        bits(static_cast<int>(bits)),
        words_of_head(words.dimensions()[3]),
        groups(scale.dimensions()[3]),
        planes(PlanesOf(this->bits, n)) {}
};

struct Problem {
  const float* q;
  const int32_t *start, *window;
  Store k, v;
  float* y;
  int64_t batch, places, tokens, heads, kv_heads, n;
  int64_t width;   // n, padded
  int64_t rows;    // queries of a head of the cache
  int64_t blocks;  // of kRows of them

  int64_t RowOffset(int64_t b, int64_t kv, int64_t row) const {
    const int64_t shared = heads / kv_heads;
    return ((b * tokens + row / shared) * heads + kv * shared + row % shared) * n;
  }
  int64_t First(int64_t b, int64_t token) const {
    return std::max<int64_t>(0, int64_t{start[b]} + token - window[b] + 1);
  }
  int64_t Stop(int64_t b, int64_t token) const {
    return std::min<int64_t>(places, int64_t{start[b]} + token + 1);
  }
};

// Queries of a row of the batch, in blocks of kRows for every head of the cache.
struct Queries {
  std::vector<float> values;  // [kv_heads, blocks, kRows, width]
  std::vector<Rows> sums;     // [kv_heads, blocks, groups of keys]

  Queries(const Problem& p, int64_t b)
      : values(p.kv_heads * p.blocks * kRows * p.width), sums(p.kv_heads * p.blocks * p.k.groups) {
    const int64_t channels = p.n / p.k.groups;
    for (int64_t kv = 0; kv < p.kv_heads; ++kv) {
      for (int64_t row = 0; row < p.rows; ++row) {
        const int64_t block = kv * p.blocks + row / kRows, lane = row % kRows;
        const float* q = p.q + p.RowOffset(b, kv, row);
        std::memcpy(&values[(block * kRows + lane) * p.width], q, p.n * sizeof(float));
        for (int64_t c = 0; c < p.n; ++c) sums[block * p.k.groups + c / channels][lane] += q[c];
      }
    }
  }
};

// What a task knows of the softmax of its places, for every block of rows.
struct State {
  std::vector<Rows> top, total;  // [kv_heads, blocks]: the largest score, the sum of e^(score - largest)
  std::vector<Rows> shift;       // [kv_heads, blocks, groups of values]: weighted offsets
  std::vector<float> y;          // [kv_heads, blocks, kRows, width]: weighted codes

  explicit State(const Problem& p)
      : top(p.kv_heads * p.blocks, Rows{kLowest, kLowest, kLowest, kLowest}),
        total(p.kv_heads * p.blocks),
        shift(p.kv_heads * p.blocks * p.v.groups),
        y(p.kv_heads * p.blocks * kRows * p.width) {}
};

// Words to fields of kBits, `depth` words apart.
template <int kBits, int kBytes>
inline void SplitWords(const uint8_t* words, int64_t depth, uint8_t* codes) {
  typedef uint16_t Pairs __attribute__((vector_size(kBytes)));
  constexpr uint16_t kMask = ((1 << kBits) - 1) * 0x101;
  for (int64_t d = 0; d < depth; d += kBytes) {
    Pairs word;
    std::memcpy(&word, words + d, kBytes);
#pragma GCC unroll 8
    for (int field = 0; field < 8 / kBits; ++field) {
      const Pairs code = word >> (field * kBits) & kMask;
      std::memcpy(codes + field * depth + d, &code, kBytes);
    }
  }
}

// Of heads that are `stride` apart. A ragged plane runs into the next head, which comes later.
template <int kBits>
void SplitPlane(const uint8_t* words, int64_t stride, int64_t heads, int64_t depth, uint8_t* codes,
                int64_t width) {
  for (int64_t i = 0; i < heads; ++i, words += stride, codes += width) {
    if (depth % 32 == 0) {
      SplitWords<kBits, 32>(words, depth, codes);
    } else if (depth % 8 == 0) {
      SplitWords<kBits, 8>(words, depth, codes);
    } else {
      for (int field = 0; field < 8 / kBits; ++field)
        for (int64_t d = 0; d < depth; ++d)
          codes[field * depth + d] = words[d] >> (field * kBits) & ((1 << kBits) - 1);
    }
  }
}

// Codes of one head at some places, channels in order; those that pad them are any.
struct Codes {
  int64_t width;
  std::vector<uint8_t> codes, plane;  // [kTile, width], and what a ragged plane has too much

  explicit Codes(int64_t width) : width(width), codes(kTile * width + 8), plane(kTile * width + 8) {}

  void Unpack(const Store& store, const uint8_t* words, int64_t stride, int64_t places) {
    for (const Plane& p : store.planes) {
      auto* split = p.bits == 1   ? SplitPlane<1>
                    : p.bits == 2 ? SplitPlane<2>
                    : p.bits == 4 ? SplitPlane<4>
                                  : SplitPlane<8>;
      split(words, stride, places, p.depth, p.shift ? plane.data() : codes.data(), width);
      words += p.depth;
      for (int64_t i = 0; p.shift && i < places * width; ++i) codes[i] |= plane[i] << p.shift;
    }
  }
};

void WidenTile(const Store& store, int64_t place, int64_t places, int64_t kv_heads, float* scale, float* lo) {
  const int64_t of_place = kv_heads * store.groups, count = places * of_place;
  Widen(store.scale, store.half, place * of_place, count, scale);
  if (!store.symmetric) return Widen(store.lo, store.half, place * of_place, count, lo);
  for (int64_t i = 0; i < count; ++i) lo[i] = -scale[i] * (1 << (store.bits - 1));
}

// What a task needs for a tile.
struct Scratch {
  Codes keys, values;
  std::vector<float> k_scale, k_lo, v_scale, v_lo;  // [kTile, kv_heads, groups]
  float weights[kTile * kRows], scaled[kTile * kRows];

  explicit Scratch(const Problem& p)
      : keys(p.width),
        values(p.width),
        k_scale(kTile * p.kv_heads * p.k.groups),
        k_lo(k_scale.size()),
        v_scale(kTile * p.kv_heads * p.v.groups),
        v_lo(v_scale.size()) {}
};

// One group of keys; scales and offsets of places are `step` apart.
template <int kUsed>
void AddScores(const uint8_t* codes, int64_t width, int64_t places, int64_t channels, const float* q,
               Rows q_sum, const float* scale, const float* lo, int64_t step, float* scores) {
  for (int64_t s = 0; s < places; ++s, codes += width, scores += kRows) {
    Floats sums[kRows] = {};
    for (int64_t c = 0; c < channels; c += kLanes) {
      const Floats code = LoadCodes(codes + c);
#pragma GCC unroll 4
      for (int r = 0; r < kUsed; ++r) sums[r] += Get<Floats>(q + r * width + c) * code;
    }
    Put(Get<Rows>(scores) + scale[s * step] * SumLanes(sums) + lo[s * step] * q_sum, scores);
  }
}

// y = shrink y + weights code, for kVectors vectors of channels.
template <int kUsed, int kVectors>
inline void AddStrip(const uint8_t* codes, int64_t width, int64_t places, const float* weights, Rows shrink,
                     float* y) {
  Floats sums[kUsed][kVectors];
#pragma GCC unroll 4
  for (int r = 0; r < kUsed; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[r][v] = shrink[r] * Get<Floats>(y + r * width + v * kLanes);
  for (int64_t s = 0; s < places; ++s, codes += width, weights += kRows) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const Floats code = LoadCodes(codes + v * kLanes);
#pragma GCC unroll 4
      for (int r = 0; r < kUsed; ++r) sums[r][v] += weights[r] * code;
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kUsed; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) Put(sums[r][v], y + r * width + v * kLanes);
}

// One group of values.
template <int kUsed>
void AddValues(const uint8_t* codes, int64_t width, int64_t places, int64_t channels, const float* weights,
               Rows shrink, float* y) {
  constexpr int kVectors = kRegisters / 8;
  int64_t c = 0;
  for (; c + kVectors * kLanes <= channels; c += kVectors * kLanes)
    AddStrip<kUsed, kVectors>(codes + c, width, places, weights, shrink, y + c);
  for (; c < channels; c += kLanes) AddStrip<kUsed, 1>(codes + c, width, places, weights, shrink, y + c);
}

// Scores to e^(score - the largest so far); returns the factor on what came before.
Rows Soften(float* scores, int64_t places, Rows& top, Rows& total) {
  const Rows before = top;
  for (int64_t s = 0; s < places; ++s) {
    const Rows score = Get<Rows>(scores + s * kRows);
    top = score > top ? score : top;
  }
  float tops[kLanes];
  for (int i = 0; i < kLanes; i += kRows) Put(top, tops + i);
  for (int64_t i = 0; i < places * kRows; i += kLanes)
    Put(Exp<Floats, Ints>(Get<Floats>(scores + i) - Get<Floats>(tops)), scores + i);
  const Rows shrink = Exp<Rows, RowInts>(before - top);
  total *= shrink;
  for (int64_t s = 0; s < places; ++s) total += Get<Rows>(scores + s * kRows);
  return shrink;
}

// No weight where a token does not see a place of the tile.
void Mask(const Problem& p, int64_t b, int64_t block, int64_t place, int64_t places, float* scores) {
  for (int64_t row = block * kRows; row < std::min((block + 1) * kRows, p.rows); ++row) {
    const int64_t token = row / (p.heads / p.kv_heads);
    const int64_t first = p.First(b, token) - place, stop = p.Stop(b, token) - place;
    for (int64_t s = 0; s < places; ++s)
      if (s < first || s >= stop) scores[s * kRows + row % kRows] = -kInfinity;
  }
}

// One block of rows at the places of a tile, whose codes are there.
template <int kUsed>
void AddBlock(const Problem& p, const Queries& queries, int64_t b, int64_t kv, int64_t block, int64_t place,
              int64_t places, bool cut, Scratch& scratch, State& state) {
  const int64_t at = kv * p.blocks + block;
  std::fill(scratch.weights, scratch.weights + kTile * kRows, 0.f);
  const int64_t k_channels = p.k.groups == 1 ? p.width : p.n / p.k.groups;
  for (int64_t g = 0; g < p.k.groups; ++g) {
    const int64_t of_place = kv * p.k.groups + g;
    AddScores<kUsed>(&scratch.keys.codes[g * k_channels], p.width, places, k_channels,
                     &queries.values[at * kRows * p.width + g * k_channels],
                     queries.sums[at * p.k.groups + g], &scratch.k_scale[of_place], &scratch.k_lo[of_place],
                     p.kv_heads * p.k.groups, scratch.weights);
  }
  if (cut) Mask(p, b, block, place, places, scratch.weights);
  const Rows shrink = Soften(scratch.weights, places, state.top[at], state.total[at]);
  const int64_t v_channels = p.v.groups == 1 ? p.width : p.n / p.v.groups;
  for (int64_t g = 0; g < p.v.groups; ++g) {
    const float *scale = &scratch.v_scale[kv * p.v.groups + g], *lo = &scratch.v_lo[kv * p.v.groups + g];
    Rows shift = shrink * state.shift[at * p.v.groups + g];
    for (int64_t s = 0; s < places; ++s, scale += p.kv_heads * p.v.groups, lo += p.kv_heads * p.v.groups) {
      const Rows weight = Get<Rows>(scratch.weights + s * kRows);
      Put(weight * *scale, scratch.scaled + s * kRows);
      shift += weight * *lo;
    }
    state.shift[at * p.v.groups + g] = shift;
    AddValues<kUsed>(&scratch.values.codes[g * v_channels], p.width, places, v_channels, scratch.scaled, shrink,
                     &state.y[at * kRows * p.width + g * v_channels]);
  }
}

// All heads at the places of a tile.
void AddTile(const Problem& p, const Queries& queries, int64_t b, int64_t place, int64_t places,
             Scratch& scratch, State& state) {
  const int64_t at = b * p.places + place;
  WidenTile(p.k, at, places, p.kv_heads, scratch.k_scale.data(), scratch.k_lo.data());
  WidenTile(p.v, at, places, p.kv_heads, scratch.v_scale.data(), scratch.v_lo.data());
  const bool cut = place < p.First(b, p.tokens - 1) || place + places > p.Stop(b, 0);
  const auto unpack = [&](const Store& store, int64_t kv, Codes& codes) {
    const int64_t stride = p.kv_heads * store.words_of_head;
    codes.Unpack(store, store.words + at * stride + kv * store.words_of_head, stride, places);
  };
  for (int64_t kv = 0; kv < p.kv_heads; ++kv) {
    unpack(p.k, kv, scratch.keys);
    unpack(p.v, kv, scratch.values);
    for (int64_t block = 0; block < p.blocks; ++block) {
      const int64_t used = p.rows - block * kRows;
      auto* add = used == 1 ? AddBlock<1> : used == 2 ? AddBlock<2> : used == 3 ? AddBlock<3> : AddBlock<4>;
      add(p, queries, b, kv, block, place, places, cut, scratch, state);
    }
  }
}

// The result of a row of the batch from the states of its parts.
void Merge(const Problem& p, int64_t b, const State* states, int64_t parts) {
  const int64_t channels = p.n / p.v.groups;
  for (int64_t kv = 0; kv < p.kv_heads; ++kv) {
    for (int64_t block = 0; block < p.blocks; ++block) {
      const int64_t at = kv * p.blocks + block;
      Rows top = states[0].top[at], total = {};
      for (int64_t i = 1; i < parts; ++i) top = states[i].top[at] > top ? states[i].top[at] : top;
      for (int64_t i = 0; i < parts; ++i)
        total += states[i].total[at] * Exp<Rows, RowInts>(states[i].top[at] - top);
      for (int64_t i = 0; i < parts; ++i) {
        const Rows share = Exp<Rows, RowInts>(states[i].top[at] - top) / total;
        for (int64_t row = block * kRows; row < std::min((block + 1) * kRows, p.rows); ++row) {
          const int64_t lane = row % kRows;
          const float* part = &states[i].y[(at * kRows + lane) * p.width];
          float* y = p.y + p.RowOffset(b, kv, row);
          for (int64_t c = 0; c < p.n; ++c) {
            const float value = part[c] + states[i].shift[at * p.v.groups + c / channels][lane];
            y[c] = share[lane] * value + (i ? y[c] : 0.f);
          }
        }
      }
    }
  }
}

ffi::Error CacheAttention(ffi::ThreadPool pool, int64_t k_bits, int64_t k_symmetric, int64_t v_bits,
                          int64_t v_symmetric, ffi::Buffer<ffi::F32> q, ffi::Buffer<ffi::S32> start,
                          ffi::Buffer<ffi::S32> window, ffi::Buffer<ffi::U8> k_words, ffi::AnyBuffer k_scale,
                          ffi::AnyBuffer k_lo, ffi::Buffer<ffi::U8> v_words, ffi::AnyBuffer v_scale,
                          ffi::AnyBuffer v_lo, ffi::ResultBuffer<ffi::F32> y) {
  const auto of_q = q.dimensions(), of_words = k_words.dimensions();
  Problem p{q.typed_data(),
            start.typed_data(),
            window.typed_data(),
            Store(k_bits, k_symmetric, of_q[3], k_words, k_scale, k_lo),
            Store(v_bits, v_symmetric, of_q[3], v_words, v_scale, v_lo),
            y->typed_data(),
            of_q[0], of_words[1], of_q[1], of_q[2], of_words[2], of_q[3], 0, 0, 0};
  p.width = (p.n + kPadding - 1) / kPadding * kPadding;
  p.rows = p.tokens * p.heads / p.kv_heads;
  p.blocks = (p.rows + kRows - 1) / kRows;

  std::vector<Queries> queries;
  int64_t longest = 1;
  for (int64_t b = 0; b < p.batch; ++b) {
    queries.emplace_back(p, b);
    longest = std::max(longest, p.Stop(b, p.tokens - 1) - p.First(b, 0));
  }
  const int64_t threads = std::max<int64_t>(1, pool.num_threads());
  const int64_t worthwhile = longest * p.tokens * p.heads * p.n / kProductsOfTask;
  // More parts than threads, so that one that is interrupted does not hold up the others.
  const int64_t wanted = threads == 1 ? 1 : (4 * threads + p.batch - 1) / p.batch;
  const int64_t parts = std::max<int64_t>(1, std::min({wanted, worthwhile, (longest + kTile - 1) / kTile}));
  std::vector<State> states(p.batch * parts, State(p));
  Run(pool, p.batch * parts, [&](int64_t i) {
    const int64_t b = i / parts, part = i % parts;
    const int64_t first = p.First(b, 0), stop = p.Stop(b, p.tokens - 1);
    const int64_t tiles = (stop - first + kTile - 1) / kTile;
    Scratch scratch(p);
    for (int64_t tile = part * tiles / parts; tile < (part + 1) * tiles / parts; ++tile) {
      const int64_t place = first + tile * kTile;
      AddTile(p, queries[b], b, place, std::min(kTile, stop - place), scratch, states[i]);
    }
  });
  for (int64_t b = 0; b < p.batch; ++b) Merge(p, b, &states[b * parts], parts);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxquantCacheAttention, CacheAttention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<int64_t>("k_bits")
                                  .Attr<int64_t>("k_symmetric")
                                  .Attr<int64_t>("v_bits")
                                  .Attr<int64_t>("v_symmetric")
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
