// x [rows, in] times packed words [blocks, words, out]; the layout is that of quant/packing.py.
//
// y[m, n] = sum_b scale[g(b), n] (sum_k x[m, k] code[k, n] - zero[g(b), n] sum_k x[m, k]),  k in block b
//
// The product is linear in the codes, so every plane of a code is a product of its own and no code is put
// together. A field is used where it lies in its word: x is multiplied by the power of two that this costs,
// which is exact.

#include "native.h"

namespace {

using namespace jaxquant;

// Columns of a task; also what rows of scratch are padded to: no strip is wider.
constexpr int64_t kPadding = 64;
constexpr int kTileRows = 8;
// Tiles of a task: sums of more rows would fall out of the first caches.
constexpr int64_t kTaskTiles = 2;
// Products below which another thread costs more than it saves.
constexpr int64_t kProductsOfTask = 1 << 18;

struct Problem {
  const float* x;
  const uint8_t* words;
  const void *scale, *zero;
  bool half;  // scale and zero are float16, else float32
  float* y;
  int64_t rows, in, out, blocks, groups, block, block_words, block_fields;
  std::vector<Plane> planes;
};

// Rows of x that one pass over the words takes, in the order in which fields come; 0 where a plane is ragged.
struct Tile {
  int64_t row, rows;          // of x
  int64_t height;             // rows with those that are padded
  std::vector<float> values;  // [blocks, block_fields, height]
  std::vector<float> sums;    // [blocks, height]
};

Tile MakeTile(const Problem& p, int64_t row) {
  Tile tile{row, std::min<int64_t>(p.rows - row, kTileRows), 0, {}, {}};
  tile.height = tile.rows == 1 ? 1 : tile.rows <= 4 ? 4 : kTileRows;
  tile.values.assign(p.blocks * p.block_fields * tile.height, 0.f);
  tile.sums.assign(p.blocks * tile.height, 0.f);
  float* value = tile.values.data();
  for (int64_t b = 0; b < p.blocks; ++b) {
    const float* x = p.x + row * p.in + b * p.block;
    for (int64_t r = 0; r < tile.rows; ++r) {
      float sum = 0;
      for (int64_t k = 0; k < p.block; ++k) sum += x[r * p.in + k];
      tile.sums[b * tile.height + r] = sum;
    }
    for (const Plane& plane : p.planes) {
      for (int64_t d = 0; d < plane.depth; ++d) {
        for (int field = 0; field < 8 / plane.bits; ++field, value += tile.height) {
          const int64_t k = d + field * plane.depth;
          const int exponent = plane.shift - field * plane.bits;
          const float power = exponent < 0 ? 1.f / (1 << -exponent) : 1 << exponent;
          if (k >= p.block) continue;
          for (int64_t r = 0; r < tile.rows; ++r) value[r] = power * x[r * p.in + k];
        }
      }
    }
  }
  return tile;
}

template <int kBits, int kRows, int kVectors>
inline __attribute__((always_inline)) void AddPlane(const uint8_t* words, int64_t stride, int64_t depth,
                                                    const float* x, Floats (&sums)[kRows][kVectors]) {
  constexpr int kFields = 8 / kBits;
  for (int64_t d = 0; d < depth; ++d, words += stride, x += kFields * kRows) {
    __builtin_prefetch(words + 4 * kVectors * kLanes);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const Ints word = Load(words + v * kLanes);
#pragma GCC unroll 8
      for (int field = 0; field < kFields; ++field) {
        const int mask = ((1 << kBits) - 1) << (field * kBits);
        const Floats code = __builtin_convertvector(kBits == 8 ? word : word & mask, Floats);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) sums[r][v] += x[field * kRows + r] * code;
      }
    }
  }
}

// One block and the columns of one strip: y += scale * (x @ code - zero * sum(x)).
template <int kRows, int kVectors>
void AddStrip(const Problem& p, const uint8_t* words, int64_t stride, const float* scale, const float* zero,
              const float* x, const float* x_sums, float* y, int64_t y_stride) {
  Floats sums[kRows][kVectors] = {};
  for (const Plane& plane : p.planes) {
    switch (plane.bits) {
      case 1: AddPlane<1>(words, stride, plane.depth, x, sums); break;
      case 2: AddPlane<2>(words, stride, plane.depth, x, sums); break;
      case 4: AddPlane<4>(words, stride, plane.depth, x, sums); break;
      default: AddPlane<8>(words, stride, plane.depth, x, sums);
    }
    words += plane.depth * stride;
    x += plane.depth * (8 / plane.bits) * kRows;
  }
  for (int v = 0; v < kVectors; ++v) {
    Floats s, z, old;
    std::memcpy(&s, scale + v * kLanes, sizeof(s));
    std::memcpy(&z, zero + v * kLanes, sizeof(z));
    for (int r = 0; r < kRows; ++r) {
      float* place = y + r * y_stride + v * kLanes;
      std::memcpy(&old, place, sizeof(old));
      old += s * (sums[r][v] - z * x_sums[r]);
      std::memcpy(place, &old, sizeof(old));
    }
  }
}

// One block and the columns of a task, of which there are `columns`; scale, zero and y are padded, words not.
template <int kRows>
void AddBlock(const Problem& p, const uint8_t* words, int64_t columns, const float* scale, const float* zero,
              const Tile& tile, int64_t block, float* y, int64_t y_stride, std::vector<uint8_t>& copy) {
  constexpr int kVectors = kRows == 1 ? 4 : kRegisters / (2 * kRows);
  constexpr int kStrip = kVectors * kLanes;
  static_assert(kStrip <= kPadding);
  const float* x = tile.values.data() + block * p.block_fields * kRows;
  const float* x_sums = tile.sums.data() + block * kRows;
  for (int64_t c = 0; c < columns; c += kStrip) {
    const uint8_t* strip = words + c;
    int64_t stride = p.out;
    if (columns - c < kStrip) {
      copy.assign(p.block_words * kStrip, 0);
      for (int64_t d = 0; d < p.block_words; ++d)
        std::memcpy(&copy[d * kStrip], strip + d * stride, columns - c);
      strip = copy.data();
      stride = kStrip;
    }
    AddStrip<kRows, kVectors>(p, strip, stride, scale + c, zero + c, x, x_sums, y + c, y_stride);
  }
}

// Rows of some tiles, columns first to last.
void Columns(const Problem& p, const Tile* tiles, int64_t count, int64_t first, int64_t last) {
  const int64_t columns = last - first;
  const int64_t width = (columns + kPadding - 1) / kPadding * kPadding;
  std::vector<float> scale(width), zero(width), y(kTileRows * count * width);
  std::vector<uint8_t> copy;
  const int64_t blocks_of_group = p.blocks / p.groups;
  for (int64_t b = 0; b < p.blocks; ++b) {
    if (b % blocks_of_group == 0) {
      const int64_t offset = b / blocks_of_group * p.out + first;
      Widen(p.scale, p.half, offset, columns, scale.data());
      Widen(p.zero, p.half, offset, columns, zero.data());
    }
    const uint8_t* words = p.words + b * p.block_words * p.out + first;
    for (int64_t t = 0; t < count; ++t) {
      const int64_t height = tiles[t].height;
      auto* add = height == 1 ? AddBlock<1> : height == 4 ? AddBlock<4> : AddBlock<kTileRows>;
      add(p, words, columns, scale.data(), zero.data(), tiles[t], b, &y[t * kTileRows * width], width, copy);
    }
  }
  for (int64_t t = 0; t < count; ++t)
    for (int64_t r = 0; r < tiles[t].rows; ++r)
      std::memcpy(p.y + (tiles[t].row + r) * p.out + first, &y[(t * kTileRows + r) * width],
                  columns * sizeof(float));
}

ffi::Error DequantMatmul(ffi::ThreadPool pool, int64_t bits, ffi::Buffer<ffi::F32> x,
                         ffi::Buffer<ffi::U8> words, ffi::AnyBuffer scale, ffi::AnyBuffer zero,
                         ffi::ResultBuffer<ffi::F32> y) {
  Problem p;
  p.x = x.typed_data();
  p.words = words.typed_data();
  p.scale = scale.untyped_data();
  p.zero = zero.untyped_data();
  p.half = scale.element_type() == ffi::F16;
  p.y = y->typed_data();
  p.rows = x.dimensions()[0];
  p.in = x.dimensions()[1];
  p.blocks = words.dimensions()[0];
  p.block_words = words.dimensions()[1];
  p.out = words.dimensions()[2];
  p.groups = scale.dimensions()[0];
  p.block = p.in / p.blocks;
  p.planes = PlanesOf(static_cast<int>(bits), p.block);
  p.block_fields = 0;
  for (const Plane& plane : p.planes) p.block_fields += plane.depth * (8 / plane.bits);

  std::vector<Tile> tiles;
  for (int64_t row = 0; row < p.rows; row += kTileRows) tiles.push_back(MakeTile(p, row));

  const int64_t bands = (tiles.size() + kTaskTiles - 1) / kTaskTiles;
  const int64_t strips = (p.out + kPadding - 1) / kPadding;
  const int64_t parts = std::min(strips, Parts(pool, p.rows * p.in * p.out / kProductsOfTask));
  const int64_t count = bands * parts;
  auto task = [&](int64_t i) {
    const int64_t part = i / bands, tile = i % bands * kTaskTiles;
    const int64_t first = part * strips / parts * kPadding, last = (part + 1) * strips / parts * kPadding;
    Columns(p, &tiles[tile], std::min<int64_t>(kTaskTiles, tiles.size() - tile), first,
            std::min(last, p.out));
  };
  Run(pool, count, task);
  return ffi::Error::Success();
}

// Columns first to last of one block: weight[k, n] = scale[n] (code[k, n] - zero[n]).
void DequantizeBlock(const std::vector<Plane>& planes, const uint8_t* words, int64_t rows, int64_t out,
                     const float* scale, const float* zero, int64_t columns, float* weight) {
  for (int64_t k = 0; k < rows; ++k) {
    const uint8_t* plane_words = words;
    const uint8_t* sources[8];
    int shifts[8], masks[8], places[8], count = 0;
    for (const Plane& plane : planes) {
      sources[count] = plane_words + k % plane.depth * out;
      shifts[count] = static_cast<int>(k / plane.depth) * plane.bits;
      masks[count] = (1 << plane.bits) - 1;
      places[count++] = plane.shift;
      plane_words += plane.depth * out;
    }
    float* row = weight + k * out;
    int64_t n = 0;
    for (; n + kLanes <= columns; n += kLanes) {
      Ints code = {};
      for (int p = 0; p < count; ++p) code |= ((Load(sources[p] + n) >> shifts[p]) & masks[p]) << places[p];
      const Floats shifted = __builtin_convertvector(code, Floats) - Get<Floats>(zero + n);
      Put<Floats>(Get<Floats>(scale + n) * shifted, row + n);
    }
    for (; n < columns; ++n) {
      int code = 0;
      for (int p = 0; p < count; ++p) code |= ((sources[p][n] >> shifts[p]) & masks[p]) << places[p];
      row[n] = scale[n] * (static_cast<float>(code) - zero[n]);
    }
  }
}

ffi::Error Dequantize(ffi::ThreadPool pool, int64_t bits, ffi::Buffer<ffi::U8> words, ffi::AnyBuffer scale,
                      ffi::AnyBuffer zero, ffi::ResultBuffer<ffi::F32> weight) {
  const int64_t blocks = words.dimensions()[0], depth = words.dimensions()[1], out = words.dimensions()[2];
  const int64_t block = weight->dimensions()[1], blocks_of_group = blocks / scale.dimensions()[0];
  const bool half = scale.element_type() == ffi::F16;
  const std::vector<Plane> planes = PlanesOf(static_cast<int>(bits), block);
  constexpr int64_t kStrip = 512;
  const int64_t strips = (out + kStrip - 1) / kStrip;
  auto task = [&](int64_t i) {
    const int64_t b = i / strips, first = i % strips * kStrip, columns = std::min(kStrip, out - first);
    float s[kStrip], z[kStrip];
    const int64_t offset = b / blocks_of_group * out + first;
    Widen(scale.untyped_data(), half, offset, columns, s);
    Widen(zero.untyped_data(), half, offset, columns, z);
    DequantizeBlock(planes, words.typed_data() + b * depth * out + first, block, out, s, z, columns,
                    weight->typed_data() + b * block * out + first);
  };
  Run(pool, blocks * strips, task);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxquantDequantize, Dequantize,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<int64_t>("bits")
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxquantDequantMatmul, DequantMatmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<int64_t>("bits")
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
