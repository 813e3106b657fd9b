// Quantized activations [rows, in] times packed words [blocks, words, out] in the layout of quant/packing.py.
//
// y[m, n] = sum_t S (s (sum_k p q - Z sum_k p) + c (sum_k q - N Z)),  k in piece t
//
// Pieces are runs of N channels inside one block of words and one group of x; p, q: codes with their middle at
// 0; s, c: scale of x and its value at p = 0; S, Z: scale of the weight and its code of value 0. The sums over
// k are exact in int32. Instructions multiply four bytes at a time, so the words of four rows are interleaved,
// a strip of columns and a block at a time; fields are masked where they are multiplied, the planes of a code
// are products of their own, from the highest down.

#include <numeric>

#include "native.h"

namespace {

namespace ffi = xla::ffi;
using jaxquant::Parts;
using jaxquant::Plane;
using jaxquant::PlanesOf;
using jaxquant::Run;
using jaxquant::Widen;

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
constexpr int kLanes = 16, kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kRegisters = 16;
#else
constexpr int kLanes = 4, kRegisters = 16;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));

constexpr int kStripVectors = 4;
constexpr int kStrip = kStripVectors * kLanes;          // columns
constexpr int kQuadBytes = kStripVectors * 4 * kLanes;  // four rows of a strip
constexpr int kTileRows = 4;
// Tiles of a task: for more rows its sums would fall out of the second cache.
constexpr int64_t kTaskTiles = 16;
// Products below which another thread costs more than it saves.
constexpr int64_t kProductsOfTask = 1 << 19;

template <typename T>
T Load(const void* from) {
  T value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

template <typename T>
void Store(void* to, const T& value) {
  std::memcpy(to, &value, sizeof(value));
}

// Four rows of bytes -> in every lane the four bytes of a column.
inline void Interleave(const uint8_t* const (&rows)[4], uint8_t* target) {
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
  const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
  __m512i a[4];
  for (int i = 0; i < 4; ++i) a[i] = _mm512_permutexvar_epi32(order, Load<__m512i>(rows[i]));
  const __m512i ab[2] = {_mm512_unpacklo_epi8(a[0], a[1]), _mm512_unpackhi_epi8(a[0], a[1])};
  const __m512i cd[2] = {_mm512_unpacklo_epi8(a[2], a[3]), _mm512_unpackhi_epi8(a[2], a[3])};
  for (int half = 0; half < 2; ++half) {
    Store(target + 128 * half, _mm512_unpacklo_epi16(ab[half], cd[half]));
    Store(target + 128 * half + 64, _mm512_unpackhi_epi16(ab[half], cd[half]));
  }
#elif defined(__AVX2__)
  const __m256i order = _mm256_set_epi32(7, 5, 3, 1, 6, 4, 2, 0);
  __m256i a[4];
  for (int i = 0; i < 4; ++i) a[i] = _mm256_permutevar8x32_epi32(Load<__m256i>(rows[i]), order);
  const __m256i ab[2] = {_mm256_unpacklo_epi8(a[0], a[1]), _mm256_unpackhi_epi8(a[0], a[1])};
  const __m256i cd[2] = {_mm256_unpacklo_epi8(a[2], a[3]), _mm256_unpackhi_epi8(a[2], a[3])};
  for (int half = 0; half < 2; ++half) {
    Store(target + 64 * half, _mm256_unpacklo_epi16(ab[half], cd[half]));
    Store(target + 64 * half + 32, _mm256_unpackhi_epi16(ab[half], cd[half]));
  }
#else
  for (int column = 0; column < kStrip; ++column)
    for (int i = 0; i < 4; ++i) target[4 * column + i] = rows[i][column];
#endif
}

// sums + four products a lane, of unsigned bytes of `codes` and signed bytes of x.
inline Ints AddProducts(Ints sums, Words codes, int32_t x) {
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
  return (Ints)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)codes, _mm512_set1_epi32(x));
#elif defined(__AVXVNNI__)
  return (Ints)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)codes, _mm256_set1_epi32(x));
#elif defined(__AVX2__)
  // Not maddubs, whose sums of two products saturate at 16 bits.
  const __m256i signs = _mm256_set1_epi32(x);
  const __m256i odd = _mm256_srai_epi16(signs, 8);
  const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(signs, 8), 8);
  const Words low = codes & 0x00ff00ffu, high = (codes >> 8) & 0x00ff00ffu;
  return sums + (Ints)_mm256_madd_epi16((__m256i)low, even) + (Ints)_mm256_madd_epi16((__m256i)high, odd);
#else
  for (int i = 0; i < 4; ++i) {
    sums += (Ints)((codes >> (8 * i)) & 255u) * static_cast<int8_t>(static_cast<uint32_t>(x) >> (8 * i));
  }
  return sums;
#endif
}

// Rows first to last of a block lie in one field of one plane, in quads of rows of words.
struct Span {
  int shift;         // of the field in its word
  uint32_t mask;     // of the field in every byte
  int rise;          // of the sums before these are added
  int64_t quad;      // in an interleaved strip
  int64_t quads;
  int64_t row;       // of the block, in the first byte of the first quad
  int64_t first, last;
};

struct Piece {
  std::vector<Span> spans;
  int64_t start;  // quads of all pieces before
};

struct Problem {
  const uint8_t *x, *words;
  const float *x_scale, *x_lo;
  const void *scale, *zero;
  bool half;  // scale and zero are float16, else float32
  float* y;
  int64_t rows, in, out, x_groups, blocks, groups, block, block_words, piece_rows;
  int middle, x_middle;
  std::vector<Plane> planes;
  std::vector<Piece> pieces;
  int64_t quads;    // of a block of words
  int64_t x_quads;  // of a block of x, where pieces may share a quad of words

  int64_t XGroup(int64_t b, size_t piece) const {
    return (b * block + static_cast<int64_t>(piece) * piece_rows) / (in / x_groups);
  }
};

void FindPieces(Problem& p) {
  p.x_quads = p.quads = 0;
  for (const Plane& plane : p.planes) p.quads += (plane.depth + 3) / 4;
  for (int64_t start = 0; start < p.block; start += p.piece_rows) {
    Piece piece{{}, p.x_quads};
    int64_t quad = p.quads;
    for (size_t i = p.planes.size(); i-- > 0;) {
      const Plane& plane = p.planes[i];
      quad -= (plane.depth + 3) / 4;
      int rise = i + 1 < p.planes.size() ? plane.bits : 0;
      for (int field = 0; field < 8 / plane.bits; ++field) {
        const int64_t zero = field * plane.depth;
        const int64_t first = std::max(start, zero);
        const int64_t last = std::min({start + p.piece_rows, zero + plane.depth, p.block});
        if (first >= last) continue;
        const int64_t skipped = (first - zero) / 4, quads = (last - zero + 3) / 4 - skipped;
        const uint32_t mask = ((1u << plane.bits) - 1) * 0x01010101u;
        piece.spans.push_back(
            {field * plane.bits, mask, rise, quad + skipped, quads, zero + 4 * skipped, first, last});
        p.x_quads += quads;
        rise = 0;
      }
    }
    p.pieces.push_back(std::move(piece));
  }
}

// Some rows of x, centred, in the order in which their quads are multiplied.
struct Tile {
  int64_t row, rows;            // of x
  int64_t height;               // rows with those that are padded
  std::vector<int32_t> values;  // [blocks, x_quads, height], four codes each
  std::vector<int32_t> sums;    // [blocks, pieces, height]
  std::vector<float> scale, middle;
};

template <typename F>
void FillRow(const Problem& p, int64_t blocks, int64_t height, int64_t row, int32_t* values, const F& code) {
  auto* bytes = reinterpret_cast<int8_t*>(values);
  for (int64_t b = 0; b < blocks; ++b) {
    for (const Piece& piece : p.pieces) {
      for (const Span& span : piece.spans) {
        for (int64_t i = 0; i < 4 * span.quads; ++i) {
          const int64_t k = span.row + i;
          bytes[(i / 4 * height + row) * 4 + i % 4] =
              k >= span.first && k < span.last ? code(b * p.block + k) : 0;
        }
        bytes += 4 * span.quads * height;
      }
    }
  }
}

Tile MakeTile(const Problem& p, int64_t row) {
  Tile tile{row, std::min<int64_t>(p.rows - row, kTileRows), 0, {}, {}, {}, {}};
  tile.height = tile.rows <= 2 ? tile.rows : kTileRows;
  const int64_t pieces = p.pieces.size();
  tile.values.assign(p.blocks * p.x_quads * tile.height, 0);
  tile.sums.assign(p.blocks * pieces * tile.height, 0);
  tile.scale.assign(tile.sums.size(), 0.f);
  tile.middle.assign(tile.sums.size(), 0.f);
  for (int64_t r = 0; r < tile.rows; ++r) {
    const uint8_t* x = p.x + (row + r) * p.in;
    auto centred = [&](int64_t k) { return static_cast<int8_t>(x[k] - p.x_middle); };
    FillRow(p, p.blocks, tile.height, r, tile.values.data(), centred);
    for (int64_t t = 0; t < p.blocks * pieces; ++t) {
      int32_t sum = 0;
      for (int64_t k = t * p.piece_rows; k < (t + 1) * p.piece_rows; ++k) sum += centred(k);
      const int64_t group = (row + r) * p.x_groups + p.XGroup(t / pieces, t % pieces);
      tile.sums[t * tile.height + r] = sum;
      tile.scale[t * tile.height + r] = p.x_scale[group];
      tile.middle[t * tile.height + r] = p.x_lo[group] + p.x_scale[group] * p.x_middle;
    }
  }
  return tile;
}

template <int kRows, int kVectors>
inline __attribute__((always_inline)) void Multiply(const Piece& piece, const uint8_t* strip,
                                                    const int32_t* x, Ints (&sums)[kRows][kVectors]) {
  for (const Span& span : piece.spans) {
    const uint8_t* quad = strip + span.quad * kQuadBytes;
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[r][v] <<= span.rise;
    }
    for (int64_t i = 0; i < span.quads; ++i, quad += kQuadBytes, x += kRows) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const Words codes = (Load<Words>(quad + v * sizeof(Words)) >> span.shift) & span.mask;
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) sums[r][v] = AddProducts(sums[r][v], codes, x[r]);
      }
    }
  }
}

// What the columns of a strip are multiplied with.
struct Strip {
  const uint8_t* codes;
  const float *scale, *zero, *weight;  // [kStrip]; zero: of centred codes; weight: S (sum_k q - N Z)
};

// One piece, a strip, and the rows of a tile. y: [kRows, y_stride].
template <int kRows>
void AddTile(const Problem& p, const Strip& strip, const Tile& tile, int64_t b, size_t piece, float* y,
             int64_t y_stride) {
  constexpr int kVectors = kRows == 1 ? kStripVectors : kRegisters / (2 * kRows);
  static_assert(kStripVectors % kVectors == 0 || kVectors > kStripVectors);
  constexpr int kStep = kVectors < kStripVectors ? kVectors : kStripVectors;
  const int32_t* x = &tile.values[(b * p.x_quads + p.pieces[piece].start) * kRows];
  const int64_t place = (b * p.pieces.size() + piece) * kRows;
  for (int first = 0; first < kStripVectors; first += kStep) {
    Ints sums[kRows][kStep] = {};
    Multiply(p.pieces[piece], strip.codes + first * sizeof(Words), x, sums);
#pragma GCC unroll 4
    for (int v = 0; v < kStep; ++v) {
      const int64_t column = (first + v) * kLanes;
      const Floats scale = Load<Floats>(strip.scale + column), zero = Load<Floats>(strip.zero + column);
      const Floats weight = Load<Floats>(strip.weight + column);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        float* target = y + r * y_stride + column;
        const int32_t sum = tile.sums[place + r];
        const Floats centred = __builtin_convertvector(sums[r][v] - p.middle * sum, Floats);
        const Floats product = centred - zero * static_cast<float>(sum);
        Store(target, Load<Floats>(target) + tile.scale[place + r] * scale * product +
                          tile.middle[place + r] * weight);
      }
    }
  }
}

// `columns` columns of one block of words -> its strips one after the other, quads of rows of a plane in
// each, the last rows of a plane repeated. Rows are read along, as memory likes it.
void InterleaveBlock(const Problem& p, const uint8_t* words, int64_t columns, uint8_t* strips) {
  uint8_t copies[4][kStrip] = {};
  for (const Plane& plane : p.planes) {
    for (int64_t d = 0; d < plane.depth; d += 4, strips += kQuadBytes) {
      uint8_t* target = strips;
      for (int64_t c = 0; c < columns; c += kStrip, target += p.quads * kQuadBytes) {
        const uint8_t* rows[4];
        for (int i = 0; i < 4; ++i) {
          rows[i] = words + std::min<int64_t>(d + i, plane.depth - 1) * p.out + c;
          if (columns - c < kStrip)
            rows[i] = static_cast<uint8_t*>(std::memcpy(copies[i], rows[i], columns - c));
        }
        Interleave(rows, target);
      }
    }
    words += plane.depth * p.out;
  }
}

// Rows of some tiles, columns first to last.
void Columns(const Problem& p, const std::vector<int32_t>& ones, const Tile* tiles, int64_t count,
             int64_t first, int64_t last) {
  const int64_t columns = last - first, width = (columns + kStrip - 1) / kStrip * kStrip;
  std::vector<float> scale(width), zero(width), weight(kStrip), y(kTileRows * count * width);
  const int64_t strip_bytes = p.quads * kQuadBytes;
  std::vector<uint8_t> codes(width / kStrip * strip_bytes);
  const int64_t blocks_of_group = p.blocks / p.groups;
  for (int64_t b = 0; b < p.blocks; ++b) {
    if (b % blocks_of_group == 0) {
      const int64_t offset = b / blocks_of_group * p.out + first;
      Widen(p.scale, p.half, offset, columns, scale.data());
      Widen(p.zero, p.half, offset, columns, zero.data());
      for (float& z : zero) z -= p.middle;
    }
    InterleaveBlock(p, p.words + b * p.block_words * p.out + first, columns, codes.data());
    for (int64_t c = 0; c < columns; c += kStrip) {
      const Strip strip{&codes[c / kStrip * strip_bytes], &scale[c], &zero[c], weight.data()};
      for (size_t piece = 0; piece < p.pieces.size(); ++piece) {
        Ints sums[1][kStripVectors] = {};
        Multiply(p.pieces[piece], strip.codes, &ones[p.pieces[piece].start], sums);
        const auto n = static_cast<int32_t>(p.piece_rows);
#pragma GCC unroll 4
        for (int v = 0; v < kStripVectors; ++v) {
          const Floats total = __builtin_convertvector(sums[0][v] - p.middle * n, Floats);
          const Floats shift = Load<Floats>(strip.zero + v * kLanes) * static_cast<float>(n);
          Store(&weight[v * kLanes], Load<Floats>(strip.scale + v * kLanes) * (total - shift));
        }
        for (int64_t t = 0; t < count; ++t) {
          const int64_t height = tiles[t].height;
          auto* add = height == 1 ? AddTile<1> : height == 2 ? AddTile<2> : AddTile<kTileRows>;
          add(p, strip, tiles[t], b, piece, &y[t * kTileRows * width + c], width);
        }
      }
    }
  }
  for (int64_t t = 0; t < count; ++t)
    for (int64_t r = 0; r < tiles[t].rows; ++r)
      std::memcpy(p.y + (tiles[t].row + r) * p.out + first, &y[(t * kTileRows + r) * width],
                  columns * sizeof(float));
}

ffi::Error IntegerMatmul(ffi::ThreadPool pool, int64_t x_bits, int64_t bits, ffi::Buffer<ffi::U8> x,
                         ffi::Buffer<ffi::F32> x_scale, ffi::Buffer<ffi::F32> x_lo,
                         ffi::Buffer<ffi::U8> words, ffi::AnyBuffer scale, ffi::AnyBuffer zero,
                         ffi::ResultBuffer<ffi::F32> y) {
  Problem p;
  p.x = x.typed_data();
  p.x_scale = x_scale.typed_data();
  p.x_lo = x_lo.typed_data();
  p.words = words.typed_data();
  p.scale = scale.untyped_data();
  p.zero = zero.untyped_data();
  p.half = scale.element_type() == ffi::F16;
  p.y = y->typed_data();
  p.rows = x.dimensions()[0];
  p.in = x.dimensions()[1];
  p.x_groups = x_scale.dimensions()[1];
  p.blocks = words.dimensions()[0];
  p.block_words = words.dimensions()[1];
  p.out = words.dimensions()[2];
  p.groups = scale.dimensions()[0];
  p.block = p.in / p.blocks;
  p.piece_rows = std::gcd(p.block, p.in / p.x_groups);
  p.middle = 1 << (bits - 1);
  p.x_middle = 1 << (x_bits - 1);
  p.planes = PlanesOf(static_cast<int>(bits), p.block);
  FindPieces(p);
  std::vector<int32_t> ones(p.x_quads);
  FillRow(p, 1, 1, 0, ones.data(), [](int64_t) { return 1; });

  std::vector<Tile> tiles((p.rows + kTileRows - 1) / kTileRows);
  Run(pool, tiles.size(), [&](int64_t i) { tiles[i] = MakeTile(p, i * kTileRows); });

  const int64_t bands = (tiles.size() + kTaskTiles - 1) / kTaskTiles;
  const int64_t strips = (p.out + kStrip - 1) / kStrip;
  const int64_t parts = std::min(strips, Parts(pool, p.rows * p.in * p.out / kProductsOfTask));
  Run(pool, bands * parts, [&](int64_t i) {
    const int64_t part = i / bands, tile = i % bands * kTaskTiles;
    const int64_t first = part * strips / parts * kStrip, last = (part + 1) * strips / parts * kStrip;
    Columns(p, ones, &tiles[tile], std::min<int64_t>(kTaskTiles, tiles.size() - tile), first,
            std::min(last, p.out));
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxquantIntegerMatmul, IntegerMatmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<int64_t>("x_bits")
                                  .Attr<int64_t>("bits")
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
