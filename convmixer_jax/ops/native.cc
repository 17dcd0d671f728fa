// ConvMixer's operations on a CPU, as XLA custom calls.
//
// Images are [B, H, W, C]. Data are float32 or bfloat16; all arithmetic is
// float32. The shapes alone decide how work is divided into tasks, so that the
// results do not depend on the number of threads.

#include "native.h"

#include <cstring>
#include <type_traits>

#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace {

// --- Vectors: GCC's vector extensions, as wide as the CPU's registers.

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t VecBits __attribute__((vector_size(kLanes * 4)));
typedef uint16_t VecHalf __attribute__((vector_size(kLanes * 2)));
using bfloat16 = uint16_t;

template <class To, class From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline Vec broadcast(float x) { return Vec{} + x; }

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline Vec load(const bfloat16* p) {
  VecHalf half;
  std::memcpy(&half, p, sizeof half);
  return bit_cast<Vec>(__builtin_convertvector(half, VecBits) << 16);
}

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

inline void store(bfloat16* p, Vec v) {
  VecBits bits = bit_cast<VecBits>(v);
  // Rounds to nearest even. A NaN must not be rounded to infinity.
  VecBits rounded = bits + 0x7fff + ((bits >> 16) & 1);
  bits = v == v ? rounded : bits | 0x400000;
  VecHalf half = __builtin_convertvector(bits >> 16, VecHalf);
  std::memcpy(p, &half, sizeof half);
}

// Loads the first n elements, and zeros beyond them.
template <class T>
inline Vec load(const T* p, int64_t n) {
  if (n >= kLanes) return load(p);
  T lanes[kLanes] = {};
  std::copy_n(p, n, lanes);
  return load(lanes);
}

template <class T>
inline void store(T* p, Vec v, int64_t n) {
  if (n >= kLanes) return store(p, v);
  T lanes[kLanes];
  store(lanes, v);
  std::copy_n(lanes, n, p);
}

// Stores the first n elements. With `past_caches`, the store bypasses the
// caches: a result larger than they are would only evict what is in them.
template <class T>
inline void stream(T* p, Vec v, int64_t n, bool past_caches) {
#if defined(__AVX__)
  if constexpr (std::is_same_v<T, float>) {
    bool aligned = reinterpret_cast<uintptr_t>(p) % sizeof v == 0;
    if (past_caches && n >= kLanes && aligned) {
#if defined(__AVX512F__)
      _mm512_stream_ps(p, v);
#else
      _mm256_stream_ps(p, v);
#endif
      return;
    }
  }
#endif
  store(p, v, n);
}

constexpr int64_t kStreamBytes = 4 << 20;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// --- Activations, their derivatives, and what is fused into a convolution.

struct Gelu {
  // |x|, the normal density times sqrt(2 pi), and q = P(N > |x|). |x| is
  // clipped at 13, where the others are nearly 0: infinity times 0 would be
  // NaN.
  struct Tail {
    Vec size, density, q;
  };

  // q is the density times a polynomial in 1 / (1 + 0.28 |x|). It was fitted to
  // an error of 5e-9 in x q. There is no cancellation in the tail.
  static inline Tail tail(Vec x) {
    Vec size = bit_cast<Vec>(bit_cast<VecBits>(x) & 0x7fffffffu);
    size = size > 13.0f ? broadcast(13.0f) : size;  // Keeps NaN.
    // exp(-x^2 / 2) = 2^(whole + part), part in [-0.5, 0.5].
    const Vec exponent = size * size * -0.72134752f;
    const Vec shifted = exponent + 12582912.0f;  // 1.5 * 2^23: rounds.
    const Vec part = exponent - (shifted - 12582912.0f);
    Vec power = broadcast(1.5403530e-4f);
    for (float c : {1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f,
                    6.9314718e-1f, 1.0f}) {
      power = power * part + c;
    }
    const VecBits whole = bit_cast<VecBits>(shifted) << 23;
    const Vec density = bit_cast<Vec>(bit_cast<VecBits>(power) + whole);
    const Vec t = 1.0f / (1.0f + 0.28f * size);
    Vec sum = broadcast(-0.10703258216381073f);
    for (float c : {0.39492639899253845f, -0.24527941644191742f,
                    0.2756590247154236f, 0.06476746499538422f,
                    0.1169590875506401f}) {
      sum = sum * t + c;
    }
    return {size, density, sum * t * density};
  }

  static inline Vec value(Vec x) {
    const Tail at = tail(x);
    return (x > 0.0f ? x : Vec{}) - at.size * at.q;
  }

  static inline Vec derivative(Vec x, Vec* value) {
    const Tail at = tail(x);
    *value = (x > 0.0f ? x : Vec{}) - at.size * at.q;
    const Vec below = at.q - at.size * at.density * 0.39894228f;
    return x > 0.0f ? 1.0f - below : below;
  }
};

struct Identity {
  static inline Vec value(Vec x) { return x; }
  static inline Vec derivative(Vec x, Vec* value) {
    *value = x;
    return broadcast(1.0f);
  }
};

struct Relu {
  // NaN stays NaN.
  static inline Vec value(Vec x) { return x < 0.0f ? Vec{} : x; }
  static inline Vec derivative(Vec x, Vec* value) {
    *value = Relu::value(x);
    return x > 0.0f ? broadcast(1.0f) : Vec{};
  }
};

// Applied to a convolution's sums before they are stored at an offset of y.
// This one stores the sums unchanged.
struct Sums {
  Vec operator()(Vec x, int64_t, int64_t, int64_t) const { return x; }
};

// act(x + bias) * scale + offset, plus the residual if there is one.
template <class Act, class T>
struct Affine {
  const float *bias, *scale, *offset;  // [C]
  const T* residual;
  Vec operator()(Vec x, int64_t at, int64_t channel, int64_t n) const {
    x = Act::value(x + load(bias + channel, n)) * load(scale + channel, n) +
        load(offset + channel, n);
    return residual ? x + load(residual + at, n) : x;
  }
};

// --- Depthwise convolution.
//
// A task is one image and a few vectors of channels. It copies them, with
// padding, into scratch memory as planes [rows, columns, lanes] and computes
// there. In the image itself, neighbouring pixels are C floats apart, so that
// many of them compete for the same few cache sets.

constexpr int kTile = 8;  // Outputs of a row that are summed in registers.
constexpr int64_t kPlanesBytes = 512 << 10;  // Half of a core's L2 cache.

struct Conv {
  int64_t batch, height, width, channels, k;
  // The size of a plane; the columns are rounded up to whole tiles.
  int64_t rows() const { return height + k - 1; }
  int64_t columns() const { return ceil_div(width, kTile) * kTile + k - 1; }
  int64_t plane() const { return rows() * columns() * kLanes; }
  int64_t vectors() const { return ceil_div(channels, kLanes); }
  int64_t image() const { return height * width * channels; }
  int64_t vectors_per_task(int planes) const {
    const int64_t fit = kPlanesBytes / (4 * plane() * planes);
    const int64_t most = std::clamp<int64_t>(fit, 1, 16);
    return ceil_div(vectors(), ceil_div(vectors(), most));
  }
};

Conv conv_of(const ffi::AnyBuffer& x, const ffi::AnyBuffer& kernel) {
  const auto d = x.dimensions();
  return {d[0], d[1], d[2], d[3], kernel.dimensions()[0]};
}

// Copies vectors [first, first + n) of an image into planes, with `low` zeros
// of padding at the top and at the left.
template <class T>
void pack(const Conv& s, const T* image, int64_t first, int64_t n, int64_t low,
          float* planes) {
  const int64_t row = s.columns() * kLanes, plane = s.plane();
  for (int64_t v = 0; v < n; ++v) {
    std::memset(planes + v * plane, 0, low * row * 4);
    std::memset(planes + v * plane + (low + s.height) * row, 0,
                (s.k - 1 - low) * row * 4);
  }
  for (int64_t y = 0; y < s.height; ++y) {
    float* to = planes + (low + y) * row;
    for (int64_t v = 0; v < n; ++v) {
      const int64_t end = (low + s.width) * kLanes;
      std::memset(to + v * plane, 0, low * kLanes * 4);
      std::memset(to + v * plane + end, 0, (row - end) * 4);
    }
    const T* from = image + y * s.width * s.channels + first * kLanes;
    const int64_t left = s.channels - first * kLanes;
    for (int64_t x = 0; x < s.width; ++x) {
      for (int64_t v = 0; v < n; ++v) {
        store(to + v * plane + (low + x) * kLanes,
              load(from + x * s.channels + v * kLanes, left - v * kLanes));
      }
    }
  }
}

// kernel [k, k, C] -> [vectors, k * k, lanes], optionally rotated by 180
// degrees.
template <class T>
std::vector<float> pack_kernel(const Conv& s, const T* kernel, bool rotate) {
  const int64_t taps = s.k * s.k;
  std::vector<float> packed(s.vectors() * taps * kLanes);
  for (int64_t v = 0; v < s.vectors(); ++v) {
    for (int64_t i = 0; i < taps; ++i) {
      const T* tap = kernel + (rotate ? taps - 1 - i : i) * s.channels;
      store(&packed[(v * taps + i) * kLanes],
            load(tap + v * kLanes, s.channels - v * kLanes));
    }
  }
  return packed;
}

// Correlates planes with the kernel, into vectors [first, first + n) of the
// image at y + image.
template <class T, class Finish>
void correlate(const Conv& s, const float* planes, const float* kernel,
               int64_t first, int64_t n, int64_t image, const Finish& finish,
               T* y) {
  const int64_t row = s.columns() * kLanes;
  const bool past_caches = s.batch * s.image() * sizeof(T) > kStreamBytes;
  for (int64_t i = 0; i < s.height; ++i) {
    for (int64_t j = 0; j < s.width; j += kTile) {
      for (int64_t v = 0; v < n; ++v) {
        const float* corner = planes + v * s.plane() + i * row + j * kLanes;
        const float* tap = kernel + (first + v) * s.k * s.k * kLanes;
        Vec sums[kTile] = {};
        for (int64_t ky = 0; ky < s.k; ++ky) {
          for (int64_t kx = 0; kx < s.k; ++kx, tap += kLanes) {
            const float* x = corner + ky * row + kx * kLanes;
            const Vec weight = load(tap);
            for (int t = 0; t < kTile; ++t) {
              sums[t] += weight * load(x + t * kLanes);
            }
          }
        }
        const int64_t channel = (first + v) * kLanes;
        const int64_t left = s.channels - channel;
        int64_t at = image + (i * s.width + j) * s.channels + channel;
        for (int t = 0; t < kTile && j + t < s.width; ++t, at += s.channels) {
          stream(y + at, finish(sums[t], at, channel, left), left, past_caches);
        }
      }
    }
  }
}

template <class T, class Finish>
void depthwise(ffi::ThreadPool& pool, const Conv& s, const T* x,
               const T* kernel, const Finish& finish, T* y) {
  const std::vector<float> packed = pack_kernel(s, kernel, false);
  const int64_t step = s.vectors_per_task(1);
  const int64_t groups = ceil_div(s.vectors(), step);
  parallel_for(pool, s.batch * groups, [&](int64_t task) {
    const int64_t image = task / groups * s.image();
    const int64_t first = task % groups * step;
    const int64_t n = std::min(step, s.vectors() - first);
    float* planes = scratch(n * s.plane());
    pack(s, x + image, first, n, (s.k - 1) / 2, planes);
    correlate(s, planes, packed.data(), first, n, image, finish, y);
  });
}

// The kernel's gradient: adds to sums [k * k, lanes] the correlation of a plane
// of x, padded as for the convolution, with a plane of y's gradient, padded by
// `low` as for the transposed convolution. kTaps taps of a kernel's row are
// summed in registers at a time.
template <int kTaps>
void correlate_taps(const Conv& s, const float* x, const float* grad,
                    int64_t low, int64_t kx, float* sums) {
  const int64_t row = s.columns() * kLanes;
  grad += low * (row + kLanes);
  for (int64_t ky = 0; ky < s.k; ++ky) {
    Vec partial[kTaps] = {};
    for (int64_t i = 0; i < s.height; ++i) {
      const float* g = grad + i * row;
      const float* p = x + (i + ky) * row + kx * kLanes;
      for (int64_t j = 0; j < s.width; ++j, g += kLanes, p += kLanes) {
        const Vec gradient = load(g);
        for (int t = 0; t < kTaps; ++t) {
          partial[t] += gradient * load(p + t * kLanes);
        }
      }
    }
    float* to = sums + (ky * s.k + kx) * kLanes;
    for (int t = 0; t < kTaps; ++t) {
      store(to + t * kLanes, load(to + t * kLanes) + partial[t]);
    }
  }
}

template <class T>
void depthwise_vjp(ffi::ThreadPool& pool, const Conv& s, const T* x,
                   const T* kernel, const T* grad, T* grad_x,
                   float* grad_kernel) {
  const std::vector<float> rotated = pack_kernel(s, kernel, true);
  const int64_t low = (s.k - 1) / 2, taps = s.k * s.k;
  const int64_t step = s.vectors_per_task(2);
  const int64_t groups = ceil_div(s.vectors(), step);
  // The images are divided into chunks, which are summed in parallel. Then the
  // chunks' sums are added.
  const int64_t chunks = std::min(s.batch, ceil_div(64, groups));
  const int64_t sums_size = s.vectors() * taps * kLanes;
  std::vector<float> sums(chunks * sums_size);
  parallel_for(pool, chunks * groups, [&](int64_t task) {
    const int64_t chunk = task / groups, first = task % groups * step;
    const int64_t n = std::min(step, s.vectors() - first);
    float* planes = scratch(2 * n * s.plane());
    float* grad_planes = planes + n * s.plane();
    for (int64_t b = chunk * s.batch / chunks;
         b < (chunk + 1) * s.batch / chunks; ++b) {
      pack(s, grad + b * s.image(), first, n, s.k - 1 - low, grad_planes);
      correlate(s, grad_planes, rotated.data(), first, n, b * s.image(),
                Sums{}, grad_x);
      pack(s, x + b * s.image(), first, n, low, planes);
      for (int64_t v = 0; v < n; ++v) {
        float* to = &sums[chunk * sums_size + (first + v) * taps * kLanes];
        const float* p = planes + v * s.plane();
        const float* g = grad_planes + v * s.plane();
        for (int64_t kx = 0; kx < s.k;) {
          const int64_t left = s.k - kx, at = s.k - 1 - low;
          // Parts of similar size: with fewer than four sums at a time, the
          // additions would wait for each other.
          const int64_t parts = ceil_div(left, 5), now = ceil_div(left, parts);
          switch (now) {
            case 1: correlate_taps<1>(s, p, g, at, kx, to); break;
            case 2: correlate_taps<2>(s, p, g, at, kx, to); break;
            case 3: correlate_taps<3>(s, p, g, at, kx, to); break;
            case 4: correlate_taps<4>(s, p, g, at, kx, to); break;
            case 5: correlate_taps<5>(s, p, g, at, kx, to); break;
          }
          kx += now;
        }
      }
    }
  });
  for (int64_t v = 0; v < s.vectors(); ++v) {
    for (int64_t i = 0; i < taps; ++i) {
      Vec total = {};
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        total += load(&sums[chunk * sums_size + (v * taps + i) * kLanes]);
      }
      store(grad_kernel + i * s.channels + v * kLanes, total,
            s.channels - v * kLanes);
    }
  }
}

// --- Pointwise convolution: matrix products.
//
// Both factors are copied in blocks that fit into the caches, the right one as
// panels of kPanel columns. They are multiplied in tiles of kTileRows x kPanel
// sums, which fill the registers.

#if defined(__AVX512F__)
constexpr int kTileRows = 14;
#else
constexpr int kTileRows = 6;
#endif
constexpr int kPanel = 2 * kLanes;
constexpr int kDepth = 384;              // Products summed in registers.
constexpr int kRowStride = kDepth + 16;  // Puts rows into different cache sets.
constexpr int kColumnStride = (kTileRows + kLanes - 1) / kLanes * kLanes;
constexpr int64_t kMaxTiles = 48 / kTileRows, kMaxTilesVjp = 24;
constexpr int64_t kMaxColumns = 1536, kMaxColumnsVjp = 384;

// tile [kTileRows, kPanel] += a [kTileRows, depth] * b [depth, kPanel]. Element
// (r, p) of a is at r * row + p * column. Meanwhile, the memory `ahead` floats
// beyond b is prefetched; 0 prefetches nothing new.
template <int row, int column>
void multiply_tile(int64_t depth, const float* a, const float* b, float* tile,
                   int64_t ahead = 0) {
  constexpr int kCacheLine = 64 / sizeof(float);
  Vec sums[kTileRows][2];
  for (int r = 0; r < kTileRows; ++r) {
    sums[r][0] = load(tile + r * kPanel);
    sums[r][1] = load(tile + r * kPanel + kLanes);
  }
  for (int64_t p = 0; p < depth; ++p, a += column, b += kPanel) {
    for (int i = 0; i < kPanel; i += kCacheLine) {
      __builtin_prefetch(b + ahead + i, 0, 2);
    }
    const Vec b0 = load(b), b1 = load(b + kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) {
      sums[r][0] += a[r * row] * b0;
      sums[r][1] += a[r * row] * b1;
    }
  }
  for (int r = 0; r < kTileRows; ++r) {
    store(tile + r * kPanel, sums[r][0]);
    store(tile + r * kPanel + kLanes, sums[r][1]);
  }
}

// Copies n elements as floats, and adds zeros up to `filled` elements.
template <class T>
inline void copy_row(const T* from, int64_t n, int64_t filled, float* to) {
  for (int64_t i = 0; i < filled; i += kLanes) {
    store(to + i, i < n ? load(from + i, n - i) : Vec{}, filled - i);
  }
}

// The length of the parts if n is divided into equal parts of at most `most`.
int64_t even(int64_t n, int64_t most) { return ceil_div(n, ceil_div(n, most)); }

// Copies b [depth, columns], or the transpose of b [columns, depth], into
// panels [panels, depth, kPanel].
template <class T>
std::unique_ptr<float[]> pack_panels(ffi::ThreadPool& pool, const T* b,
                                     int64_t depth, int64_t columns,
                                     bool transposed) {
  const int64_t panels = ceil_div(columns, kPanel);
  std::unique_ptr<float[]> packed(new float[panels * depth * kPanel]);
  parallel_for(pool, panels, [&](int64_t panel) {
    float* to = packed.get() + panel * depth * kPanel;
    const int64_t first = panel * kPanel;
    const int64_t n = std::min<int64_t>(kPanel, columns - first);
    for (int64_t p = 0; p < depth; ++p, to += kPanel) {
      if (!transposed) {
        copy_row(b + p * columns + first, n, kPanel, to);
      } else {
        for (int64_t j = 0; j < kPanel; ++j) {
          T element[kLanes] = {};
          if (j < n) element[0] = b[(first + j) * depth + p];
          to[j] = load(element)[0];
        }
      }
    }
  });
  return packed;
}

// The offset of element (i, j) in a block of sums [panels, block_rows, kPanel].
int64_t in_tiles(int64_t block_rows, int64_t i, int64_t j) {
  return (j / kPanel * block_rows + i) * kPanel + j % kPanel;
}

// y [rows, columns] = a [rows, depth] * b [depth, columns], b given as panels.
template <class T, class Finish>
void multiply(ffi::ThreadPool& pool, const T* a, const float* panels,
              const Finish& finish, T* y, int64_t rows, int64_t depth,
              int64_t columns) {
  const bool past_caches = rows * columns * sizeof(T) > kStreamBytes;
  const int64_t tiles = even(ceil_div(rows, kTileRows), kMaxTiles);
  const int64_t block_rows = tiles * kTileRows;
  const int64_t block_columns =
      ceil_div(even(columns, kMaxColumns), kPanel) * kPanel;
  const int64_t column_blocks = ceil_div(columns, block_columns);
  const int64_t row_blocks = ceil_div(rows, block_rows);
  parallel_for(pool, row_blocks * column_blocks, [&](int64_t task) {
    const int64_t i0 = task / column_blocks * block_rows;
    const int64_t j0 = task % column_blocks * block_columns;
    const int64_t m = std::min(block_rows, rows - i0);
    const int64_t n = std::min(block_columns, columns - j0);
    float* sums = scratch(block_rows * (block_columns + kRowStride));
    float* left = sums + block_rows * block_columns;
    std::memset(sums, 0, block_rows * block_columns * 4);
    for (int64_t p0 = 0; p0 < depth; p0 += kDepth) {
      const int64_t part = std::min<int64_t>(kDepth, depth - p0);
      for (int64_t i = 0; i < ceil_div(m, kTileRows) * kTileRows; ++i) {
        const int64_t filled = ceil_div(part, kLanes) * kLanes;
        copy_row(a + (i0 + i) * depth + p0, i < m ? part : 0, filled,
                 left + i * kRowStride);
      }
      for (int64_t j = 0; j < n; j += kPanel) {
        const float* panel =
            panels + ((j0 + j) / kPanel * depth + p0) * kPanel;
        for (int64_t i = 0; i < m; i += kTileRows) {
          // The last tile of a panel prefetches the next panel.
          multiply_tile<kRowStride, 1>(
              part, left + i * kRowStride, panel,
              sums + in_tiles(block_rows, i, j),
              i + kTileRows < m ? 0 : depth * kPanel);
        }
      }
    }
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t j = 0; j < n; j += kLanes) {
        const int64_t at = (i0 + i) * columns + j0 + j;
        const Vec sum = load(sums + in_tiles(block_rows, i, j));
        stream(y + at, finish(sum, at, j0 + j, n - j), n - j, past_caches);
      }
    }
  });
}

// y [rows, columns] = transpose of a [depth, rows] * b [depth, columns]. The
// depth is large: it is divided into chunks, which are summed in parallel. Then
// the chunks' sums are added.
template <class T>
void multiply_transposed(ffi::ThreadPool& pool, const T* a, const T* b,
                         float* y, int64_t depth, int64_t rows,
                         int64_t columns) {
  constexpr int64_t kStep = 128;
  const int64_t tiles = even(ceil_div(rows, kTileRows), kMaxTilesVjp);
  const int64_t block_rows = tiles * kTileRows;
  const int64_t block_columns =
      ceil_div(even(columns, kMaxColumnsVjp), kPanel) * kPanel;
  const int64_t row_blocks = ceil_div(rows, block_rows);
  const int64_t column_blocks = ceil_div(columns, block_columns);
  const int64_t blocks = row_blocks * column_blocks;
  const int64_t block_size = block_rows * block_columns;
  const int64_t chunks = std::clamp<int64_t>(
      ceil_div(32, blocks), 1, std::max<int64_t>(depth / (16 * kStep), 1));
  std::unique_ptr<float[]> sums(new float[chunks * blocks * block_size]);
  parallel_for(pool, chunks * blocks, [&](int64_t task) {
    const int64_t block = task % blocks, chunk = task / blocks;
    const int64_t i0 = block / column_blocks * block_rows;
    const int64_t j0 = block % column_blocks * block_columns;
    const int64_t m = std::min(block_rows, rows - i0);
    const int64_t n = std::min(block_columns, columns - j0);
    float* left = scratch(kStep * (tiles * kColumnStride + block_columns));
    float* right = left + kStep * tiles * kColumnStride;
    float* to = sums.get() + task * block_size;
    std::memset(to, 0, block_size * 4);
    const int64_t end = (chunk + 1) * depth / chunks;
    for (int64_t p0 = chunk * depth / chunks; p0 < end; p0 += kStep) {
      const int64_t part = std::min(kStep, end - p0);
      for (int64_t p = 0; p < part; ++p) {
        for (int64_t i = 0, t = 0; i < m; i += kTileRows, ++t) {
          copy_row(a + (p0 + p) * rows + i0 + i, m - i, kColumnStride,
                   left + (t * kStep + p) * kColumnStride);
        }
        for (int64_t j = 0; j < n; j += kPanel) {
          copy_row(b + (p0 + p) * columns + j0 + j, n - j, kPanel,
                   right + (j * kStep + p * kPanel));
        }
      }
      for (int64_t j = 0; j < n; j += kPanel) {
        for (int64_t i = 0, t = 0; i < m; i += kTileRows, ++t) {
          multiply_tile<1, kColumnStride>(
              part, left + t * kStep * kColumnStride, right + j * kStep,
              to + in_tiles(block_rows, i, j));
        }
      }
    }
  });
  parallel_for(pool, rows, [&](int64_t i) {
    for (int64_t j = 0; j < columns; j += kLanes) {
      const int64_t block =
          i / block_rows * column_blocks + j / block_columns;
      const float* from =
          sums.get() + block * block_size +
          in_tiles(block_rows, i % block_rows, j % block_columns);
      Vec total = {};
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        total += load(from + chunk * blocks * block_size);
      }
      store(y + i * columns + j, total, columns - j);
    }
  });
}

// --- BatchNorm: passes over the images.

constexpr int64_t kBlock = 256;  // Channels per task.

struct Pixels {
  int64_t batch, size, channels;
};

Pixels pixels_of(const ffi::AnyBuffer& x) {
  const auto d = x.dimensions();
  return {d[0], d[1] * d[2], d[3]};
}

// Calls task(offset of the image, offset of its row in [B, C] arrays, first
// channel, number of channels) for each image and each block of channels.
template <class Task>
void for_blocks(ffi::ThreadPool& pool, const Pixels& s, const Task& task) {
  const int64_t blocks = ceil_div(s.channels, kBlock);
  parallel_for(pool, s.batch * blocks, [&](int64_t i) {
    const int64_t b = i / blocks, first = i % blocks * kBlock;
    const int64_t n = std::min(kBlock, s.channels - first);
    task(b * s.size * s.channels, b * s.channels, first, n);
  });
}

// For each image, the mean of act(x + bias) and the sum of squared differences
// from it: [B, C] each.
template <class Act, class T>
void moments(ffi::ThreadPool& pool, const Pixels& s, const T* x,
             const float* bias, float* means, float* squares) {
  for_blocks(pool, s, [&](int64_t image, int64_t row, int64_t c0, int64_t n) {
    // Differences are taken from the mean of a few pixels, to avoid
    // cancellation.
    Vec origin[kBlock / kLanes] = {}, sum[kBlock / kLanes] = {},
        square[kBlock / kLanes] = {};
    const auto activated = [&](int64_t pixel, int64_t c) {
      const T* p = x + image + pixel * s.channels + c0 + c;
      return Act::value(load(p, n - c) + load(bias + c0 + c, n - c));
    };
    const int64_t few = std::min<int64_t>(s.size, 8);
    for (int64_t i = 0; i < few; ++i) {
      for (int64_t c = 0, v = 0; c < n; c += kLanes, ++v) {
        origin[v] += activated(i * s.size / few, c) / static_cast<float>(few);
      }
    }
    for (int64_t i = 0; i < s.size; ++i) {
      for (int64_t c = 0, v = 0; c < n; c += kLanes, ++v) {
        const Vec d = activated(i, c) - origin[v];
        sum[v] += d;
        square[v] += d * d;
      }
    }
    for (int64_t c = 0, v = 0; c < n; c += kLanes, ++v) {
      const Vec mean = sum[v] / static_cast<float>(s.size);
      store(means + row + c0 + c, origin[v] + mean, n - c);
      store(squares + row + c0 + c, square[v] - sum[v] * mean, n - c);
    }
  });
}

// y = act(x + bias) * scale + offset, plus the residual if there is one; scale
// and offset are [B, C].
template <class Act, class T>
void normalize(ffi::ThreadPool& pool, const Pixels& s, const T* x,
               const float* bias, const float* scale, const float* offset,
               const T* residual, T* y) {
  const bool past_caches =
      s.batch * s.size * s.channels * sizeof(T) > kStreamBytes;
  for_blocks(pool, s, [&](int64_t image, int64_t row, int64_t c0, int64_t n) {
    for (int64_t i = 0; i < s.size; ++i) {
      const int64_t at = image + i * s.channels + c0;
      for (int64_t c = 0; c < n; c += kLanes) {
        const int64_t some = n - c;
        Vec a = Act::value(load(x + at + c, some) + load(bias + c0 + c, some));
        a = a * load(scale + row + c0 + c, some) +
            load(offset + row + c0 + c, some);
        if (residual) a += load(residual + at + c, some);
        stream(y + at + c, a, some, past_caches);
      }
    }
  });
}

// For each image, the sums of grad and of grad * (act(x + bias) - mean): [B, C]
// each.
template <class Act, class T>
void grad_sums(ffi::ThreadPool& pool, const Pixels& s, const T* x,
               const float* bias, const float* mean, const T* grad,
               float* sums, float* products) {
  for_blocks(pool, s, [&](int64_t image, int64_t row, int64_t c0, int64_t n) {
    Vec sum[kBlock / kLanes] = {}, product[kBlock / kLanes] = {};
    for (int64_t i = 0; i < s.size; ++i) {
      const int64_t at = image + i * s.channels + c0;
      for (int64_t c = 0, v = 0; c < n; c += kLanes, ++v) {
        const int64_t some = n - c;
        const Vec a =
            Act::value(load(x + at + c, some) + load(bias + c0 + c, some));
        const Vec g = load(grad + at + c, some);
        sum[v] += g;
        product[v] += g * (a - load(mean + row + c0 + c, some));
      }
    }
    for (int64_t c = 0, v = 0; c < n; c += kLanes, ++v) {
      store(sums + row + c0 + c, sum[v], n - c);
      store(products + row + c0 + c, product[v], n - c);
    }
  });
}

// grad_x = (grad * scale + act(x + bias) * slope + offset) * act'(x + bias),
// and its sums over each image, [B, C].
template <class Act, class T>
void input_grad(ffi::ThreadPool& pool, const Pixels& s, const T* x,
                const float* bias, const float* scale, const float* slope,
                const float* offset, const T* grad, T* grad_x, float* sums) {
  const bool past_caches =
      s.batch * s.size * s.channels * sizeof(T) > kStreamBytes;
  for_blocks(pool, s, [&](int64_t image, int64_t row, int64_t c0, int64_t n) {
    Vec sum[kBlock / kLanes] = {};
    for (int64_t i = 0; i < s.size; ++i) {
      const int64_t at = image + i * s.channels + c0;
      for (int64_t c = 0, v = 0; c < n; c += kLanes, ++v) {
        const int64_t some = n - c, channel = row + c0 + c;
        Vec a;
        const Vec derivative = Act::derivative(
            load(x + at + c, some) + load(bias + c0 + c, some), &a);
        const Vec g = (load(grad + at + c, some) * load(scale + channel, some) +
                       a * load(slope + channel, some) +
                       load(offset + channel, some)) *
                      derivative;
        sum[v] += g;
        stream(grad_x + at + c, g, some, past_caches);
      }
    }
    for (int64_t c = 0, v = 0; c < n; c += kLanes, ++v) {
      store(sums + row + c0 + c, sum[v], n - c);
    }
  });
}

// --- XLA's calling convention.

// Calls f(T{}), where T is the element type, float or bfloat16.
template <class F>
ffi::Error with_type(const ffi::AnyBuffer& x, const F& f) {
  switch (x.element_type()) {
    case ffi::F32: f(float{}); break;
    case ffi::BF16: f(bfloat16{}); break;
    default: return ffi::Error::InvalidArgument("float32 or bfloat16 only");
  }
  return ffi::Error::Success();
}

// Calls f(T{}, Act{}); `activation` is an index into native.ACTIVATIONS.
template <class F>
ffi::Error with_types(const ffi::AnyBuffer& x, int64_t activation, const F& f) {
  if (activation < 0 || activation > 2) {
    return ffi::Error::InvalidArgument("unknown activation");
  }
  return with_type(x, [&](auto element) {
    switch (activation) {
      case 0: return f(element, Identity{});
      case 1: return f(element, Relu{});
      default: return f(element, Gelu{});
    }
  });
}

// Calls f(T{}, Affine{...}).
template <class F>
ffi::Error with_affine(const ffi::AnyBuffer& x, int64_t activation, In& bias,
                       In& scale, In& offset, In& residual, bool has_residual,
                       const F& f) {
  return with_types(x, activation, [&](auto element, auto act) {
    using T = decltype(element);
    f(element, Affine<decltype(act), T>{
                   data<float>(bias), data<float>(scale), data<float>(offset),
                   has_residual ? data<T>(residual) : nullptr});
  });
}

struct Depthwise {
  template <class T, class Finish>
  static void run(ffi::ThreadPool& pool, In& x, In& kernel,
                  const Finish& finish, Out& y) {
    depthwise(pool, conv_of(x, kernel), data<T>(x), data<T>(kernel), finish,
              data<T>(y));
  }
};

struct Pointwise {
  template <class T, class Finish>
  static void run(ffi::ThreadPool& pool, In& x, In& kernel,
                  const Finish& finish, Out& y) {
    const auto d = kernel.dimensions();
    const auto panels = pack_panels(pool, data<T>(kernel), d[0], d[1], false);
    multiply(pool, data<T>(x), panels.get(), finish, data<T>(y),
             x.element_count() / d[0], d[0], d[1]);
  }
};

// A convolution; Op is Depthwise or Pointwise.
template <class Op>
ffi::Error Convolve(ffi::ThreadPool pool, In x, In kernel, Out y) {
  return with_type(x, [&](auto element) {
    Op::template run<decltype(element)>(pool, x, kernel, Sums{}, y);
  });
}

// A convolution with bias, activation, BatchNorm and residual, for inference.
template <class Op>
ffi::Error ConvolveNorm(ffi::ThreadPool pool, In x, In kernel, In bias,
                        In scale, In offset, In residual, Out y,
                        int64_t activation, bool has_residual) {
  return with_affine(
      x, activation, bias, scale, offset, residual, has_residual,
      [&](auto element, const auto& finish) {
        Op::template run<decltype(element)>(pool, x, kernel, finish, y);
      });
}

ffi::Error DepthwiseVjp(ffi::ThreadPool pool, In x, In kernel, In grad,
                        Out grad_x, Out grad_kernel) {
  return with_type(x, [&](auto element) {
    using T = decltype(element);
    depthwise_vjp(pool, conv_of(x, kernel), data<T>(x), data<T>(kernel),
                  data<T>(grad), data<T>(grad_x), data<float>(grad_kernel));
  });
}

ffi::Error PointwiseVjp(ffi::ThreadPool pool, In x, In kernel, In grad,
                        Out grad_x, Out grad_kernel) {
  return with_type(x, [&](auto element) {
    using T = decltype(element);
    const auto d = kernel.dimensions();
    const int64_t rows = x.element_count() / d[0];
    const auto panels = pack_panels(pool, data<T>(kernel), d[1], d[0], true);
    multiply(pool, data<T>(grad), panels.get(), Sums{}, data<T>(grad_x), rows,
             d[1], d[0]);
    multiply_transposed(pool, data<T>(x), data<T>(grad),
                        data<float>(grad_kernel), rows, d[0], d[1]);
  });
}

ffi::Error Moments(ffi::ThreadPool pool, In x, In bias, Out means, Out squares,
                   int64_t activation) {
  return with_types(x, activation, [&](auto element, auto act) {
    moments<decltype(act)>(pool, pixels_of(x), data<decltype(element)>(x),
                           data<float>(bias), data<float>(means),
                           data<float>(squares));
  });
}

ffi::Error Normalize(ffi::ThreadPool pool, In x, In bias, In scale, In offset,
                     In residual, Out y, int64_t activation, bool has_residual) {
  return with_types(x, activation, [&](auto element, auto act) {
    using T = decltype(element);
    normalize<decltype(act)>(pool, pixels_of(x), data<T>(x), data<float>(bias),
                             data<float>(scale), data<float>(offset),
                             has_residual ? data<T>(residual) : nullptr,
                             data<T>(y));
  });
}

ffi::Error GradSums(ffi::ThreadPool pool, In x, In bias, In mean, In grad,
                    Out sums, Out products, int64_t activation) {
  return with_types(x, activation, [&](auto element, auto act) {
    using T = decltype(element);
    grad_sums<decltype(act)>(pool, pixels_of(x), data<T>(x), data<float>(bias),
                             data<float>(mean), data<T>(grad),
                             data<float>(sums), data<float>(products));
  });
}

ffi::Error InputGrad(ffi::ThreadPool pool, In x, In bias, In scale, In slope,
                     In offset, In grad, Out grad_x, Out sums, int64_t activation) {
  return with_types(x, activation, [&](auto element, auto act) {
    using T = decltype(element);
    input_grad<decltype(act)>(
        pool, pixels_of(x), data<T>(x), data<float>(bias), data<float>(scale),
        data<float>(slope), data<float>(offset), data<T>(grad), data<T>(grad_x),
        data<float>(sums));
  });
}

}  // namespace

CONVMIXER_OP(depthwise, Convolve<Depthwise>, 2, 1);
CONVMIXER_OP(depthwise_vjp, DepthwiseVjp, 3, 2);
CONVMIXER_OP(depthwise_norm, ConvolveNorm<Depthwise>, 6, 1,
             .Attr<int64_t>("activation").Attr<bool>("has_residual"));
CONVMIXER_OP(pointwise, Convolve<Pointwise>, 2, 1);
CONVMIXER_OP(pointwise_vjp, PointwiseVjp, 3, 2);
CONVMIXER_OP(pointwise_norm, ConvolveNorm<Pointwise>, 6, 1,
             .Attr<int64_t>("activation").Attr<bool>("has_residual"));
CONVMIXER_OP(moments, Moments, 2, 2, .Attr<int64_t>("activation"));
CONVMIXER_OP(normalize, Normalize, 5, 1,
             .Attr<int64_t>("activation").Attr<bool>("has_residual"));
CONVMIXER_OP(grad_sums, GradSums, 4, 2, .Attr<int64_t>("activation"));
CONVMIXER_OP(input_grad, InputGrad, 6, 2, .Attr<int64_t>("activation"));
