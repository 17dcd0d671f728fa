// Augmentation on a CPU, as XLA custom calls.
//
// Each image gets only the operations that were drawn for it. The results are
// those of convmixer_jax/augment, which has the same operations in JAX: pixels
// to the bit, noise up to rounding.

#include "native.h"

#include <cmath>
#include <cstring>

namespace {

struct Image {
  int64_t height, width;
  uint8_t* pixels;  // [height, width, 3]
  int64_t size() const { return height * width; }
  int64_t values() const { return 3 * size(); }
};

// --- Operations that map each value of a channel by a table.

struct Tables {
  uint8_t of[3][256];
};

// The same table for all channels.
template <class F>
Tables same_tables(const F& f) {
  Tables tables;
  for (int v = 0; v < 256; ++v) {
    tables.of[0][v] = tables.of[1][v] = tables.of[2][v] = f(v);
  }
  return tables;
}

void look_up(const Image& image, const Tables& tables) {
  for (uint8_t* p = image.pixels; p < image.pixels + image.values(); p += 3) {
    for (int c = 0; c < 3; ++c) p[c] = tables.of[c][p[c]];
  }
}

struct Histogram {
  int64_t count[3][256];
};

Histogram histogram(const Image& image) {
  Histogram h = {};
  for (const uint8_t* p = image.pixels; p < image.pixels + image.values();
       p += 3) {
    for (int c = 0; c < 3; ++c) ++h.count[c][p[c]];
  }
  return h;
}

// Stretches each channel to the range 0 to 255.
Tables autocontrast(const Image& image) {
  const Histogram h = histogram(image);
  Tables tables;
  for (int c = 0; c < 3; ++c) {
    int low = 0, high = 255;
    while (low < high && !h.count[c][low]) ++low;
    while (low < high && !h.count[c][high]) --high;
    const double scale = 255.0 / std::max(high - low, 1);
    for (int v = 0; v < 256; ++v) {
      // Pillow rounds the product, too: no fused multiply-add.
      const volatile double product = v * scale, offset = -low * scale;
      const double stretched = std::clamp(product + offset, 0.0, 255.0);
      tables.of[c][v] = low < high ? static_cast<uint8_t>(stretched) : v;
    }
  }
  return tables;
}

// Makes each channel's histogram uniform.
Tables equalize(const Image& image) {
  const Histogram h = histogram(image);
  Tables tables;
  for (int c = 0; c < 3; ++c) {
    int last = 255;
    while (last > 0 && !h.count[c][last]) --last;
    const int64_t step = (image.size() - h.count[c][last]) / 255;
    int64_t below = step / 2;
    for (int v = 0; v < 256; ++v) {
      tables.of[c][v] = step ? std::min<int64_t>(below / step, 255) : v;
      below += h.count[c][v];
    }
  }
  return tables;
}

// --- Operations that blend the image with a degenerate version of it.

uint8_t blend(int degenerate, float factor, int value) {
  const float blended = degenerate + factor * (value - degenerate);
  return std::min(std::max(blended, 0.0f), 255.0f);  // Truncates, like Pillow.
}

// As Pillow's mode L.
int gray(const uint8_t* rgb) {
  return (19595 * rgb[0] + 38470 * rgb[1] + 7471 * rgb[2] + 0x8000) >> 16;
}

int mean_gray(const Image& image) {
  int64_t total = 0;
  for (int64_t i = 0; i < image.size(); ++i) total += gray(image.pixels + 3 * i);
  return (2 * total + image.size()) / (2 * image.size());
}

void color(const Image& image, float factor) {
  for (uint8_t* p = image.pixels; p < image.pixels + image.values(); p += 3) {
    const int degenerate = gray(p);
    for (int c = 0; c < 3; ++c) p[c] = blend(degenerate, factor, p[c]);
  }
}

// The degenerate image is Pillow's SMOOTH: a 3 x 3 mean, the centre five times.
// The border stays.
void sharpness(const Image& image, float factor) {
  const int64_t row = 3 * image.width;
  const std::vector<uint8_t> source(image.pixels, image.pixels + image.values());
  for (int64_t y = 1; y < image.height - 1; ++y) {
    const uint8_t* from = source.data() + y * row;
    uint8_t* to = image.pixels + y * row;
    for (int64_t i = 3; i < row - 3; ++i) {
      int total = 4 * from[i];
      for (int64_t above : {-row, int64_t{0}, row}) {
        const uint8_t* at = from + i + above;
        total += at[-3] + at[0] + at[3];
      }
      to[i] = blend((2 * total + 13) / 26, factor, from[i]);
    }
  }
}

// --- Affine transforms: see geometry.affine.

enum Filter { kNearest, kBilinear, kBicubic };

typedef float Rgb __attribute__((vector_size(16)));  // The fourth is unused.

// At distance d from b, between b and c.
Rgb linear(Rgb b, Rgb c, float d) { return b + (c - b) * d; }
Rgb cubic(Rgb a, Rgb b, Rgb c, Rgb e, float d) {
  return b + d * (c - a + d * (2 * (a - b) + c - e + d * (b - a + e - c)));
}

// `p` is the pixel to the upper left of the point, and (dx, dy) its distance.
// The next row starts `row` pixels further.
template <Filter filter>
Rgb interpolate(const Rgb* p, int64_t row, float dx, float dy) {
  if constexpr (filter == kNearest) {
    return *p;
  } else if constexpr (filter == kBilinear) {
    const auto across = [&](const Rgb* p) { return linear(p[0], p[1], dx); };
    return linear(across(p), across(p + row), dy);
  } else {
    const auto across = [&](const Rgb* p) {
      return cubic(p[-1], p[0], p[1], p[2], dx);
    };
    return cubic(across(p - row), across(p), across(p + row),
                 across(p + 2 * row), dy);
  }
}

template <Filter filter>
void affine(const Image& image, const float* m, const int32_t* fill) {
  // A copy with a border of two pixels on each side that repeats the edge.
  const int64_t height = image.height, width = image.width, row = width + 4;
  auto* copy = reinterpret_cast<Rgb*>(scratch(4 * row * (height + 4)));
  for (int64_t y = 0; y < height + 4; ++y) {
    const int64_t from = std::clamp<int64_t>(y - 2, 0, height - 1);
    for (int64_t x = 0; x < row; ++x) {
      const int64_t at = std::clamp<int64_t>(x - 2, 0, width - 1);
      const uint8_t* p = image.pixels + 3 * (from * width + at);
      copy[y * row + x] = Rgb{1.0f * p[0], 1.0f * p[1], 1.0f * p[2], 0.0f};
    }
  }
  const float centre[2] = {m[2] + 0.5f * (m[0] + m[1]),
                           m[5] + 0.5f * (m[3] + m[4])};
  // Pillow's fixed-point arithmetic, with 16 fractional bits.
  const auto fixed = [](float v) {
    return static_cast<uint32_t>(
        static_cast<int32_t>(std::floor(v * 65536 + 0.5f)));
  };
  uint32_t steps[6] = {};
  if constexpr (filter == kNearest) {
    for (int i = 0; i < 6; ++i) {
      steps[i] = fixed(i % 3 < 2 ? m[i] : centre[i / 3]);
    }
  }
  uint8_t* to = image.pixels;
  for (int64_t y = 0; y < height; ++y) {
    // Rounded, as XLA does: it fuses only the products with x into the sums.
    const volatile float across_y = m[1] * y, down_y = m[4] * y;
    const float of_y[2] = {across_y, down_y};
    for (int64_t x = 0; x < width; ++x, to += 3) {
      int64_t column, line;
      float dx = 0, dy = 0;
      bool inside;
      if constexpr (filter == kNearest) {
        const auto at = [&](const uint32_t* s) {
          return static_cast<int32_t>(s[0] * static_cast<uint32_t>(x) +
                                      s[1] * static_cast<uint32_t>(y) + s[2]) >>
                 16;
        };
        column = at(steps), line = at(steps + 3);
        inside = 0 <= column && column < width && 0 <= line && line < height;
      } else {
        const float across = m[0] * x + of_y[0] + centre[0];
        const float down = m[3] * x + of_y[1] + centre[1];
        inside = 0 <= across && across < width && 0 <= down && down < height;
        // Now the pixels' centres are whole numbers.
        const float left = std::floor(across - 0.5f);
        const float top = std::floor(down - 0.5f);
        dx = across - 0.5f - left, dy = down - 0.5f - top;
        column = left, line = top;
      }
      if (inside) {
        const Rgb* p = copy + (line + 2) * row + column + 2;
        const Rgb value = interpolate<filter>(p, row, dx, dy);
        for (int c = 0; c < 3; ++c) {
          to[c] = std::min(std::max(value[c], 0.0f), 255.0f);
        }
      } else {
        for (int c = 0; c < 3; ++c) to[c] = fill[c];
      }
    }
  }
}

// --- One operation of RandAugment or of the colour jitter.

// In the order of stages.py's _CODES.
enum Code {
  kNone, kAutoContrast, kEqualize, kInvert, kPosterize, kSolarize, kSolarizeAdd,
  kBrightness, kContrast, kColor, kSharpness, kAffine
};

void apply(const Image& image, int code, float arg, const float* matrix,
           int filter, const int32_t* fill) {
  const int whole = std::floor(arg);
  const auto map = [&](const auto& f) { look_up(image, same_tables(f)); };
  switch (code) {
    case kAutoContrast: look_up(image, autocontrast(image)); break;
    case kEqualize: look_up(image, equalize(image)); break;
    case kInvert: map([](int v) { return 255 - v; }); break;
    case kPosterize: map([&](int v) { return v & -(1 << (8 - whole)); }); break;
    case kSolarize: map([&](int v) { return v < whole ? v : 255 - v; }); break;
    case kSolarizeAdd:
      map([&](int v) { return v < 128 ? std::min(v + whole, 255) : v; });
      break;
    case kBrightness: map([&](int v) { return blend(0, arg, v); }); break;
    case kContrast: {
      const int mean = mean_gray(image);
      map([&](int v) { return blend(mean, arg, v); });
      break;
    }
    case kColor: color(image, arg); break;
    case kSharpness: sharpness(image, arg); break;
    case kAffine:
      switch (filter) {
        case kNearest: affine<kNearest>(image, matrix, fill); break;
        case kBilinear: affine<kBilinear>(image, matrix, fill); break;
        default: affine<kBicubic>(image, matrix, fill); break;
      }
      break;
  }
}

// images, y: [B, H, W, 3]; codes, args, filters: [stages, B]; matrices:
// [stages, B, 6].
ffi::Error ApplyStages(ffi::ThreadPool pool, In images, In codes, In args,
                       In matrices, In filters, In fill, Out y) {
  const auto d = images.dimensions();
  const int64_t stages = codes.dimensions()[0], values = d[1] * d[2] * 3;
  parallel_for(pool, d[0], [&](int64_t i) {
    const Image image = {d[1], d[2], data<uint8_t>(y) + i * values};
    std::memcpy(image.pixels, data<uint8_t>(images) + i * values, values);
    for (int64_t s = i; s < stages * d[0]; s += d[0]) {
      apply(image, data<int32_t>(codes)[s], data<float>(args)[s],
            data<float>(matrices) + 6 * s, data<int32_t>(filters)[s],
            data<int32_t>(fill));
    }
  });
  return ffi::Error::Success();
}

// --- Noise, as jax.random.normal draws it with JAX's default keys.

// Threefry-2x32 of the numbers `first`, `first` + 1, ...; the two halves of each
// result are combined.
void random_bits(const uint32_t* key, uint64_t first, int64_t n,
                 uint32_t* bits) {
  const uint32_t keys[3] = {key[0], key[1], key[0] ^ key[1] ^ 0x1BD11BDAu};
  constexpr int kRotations[2][4] = {{13, 15, 26, 6}, {17, 29, 16, 24}};
  for (int64_t i = 0; i < n; ++i) {
    uint32_t a = static_cast<uint32_t>((first + i) >> 32) + keys[0];
    uint32_t b = static_cast<uint32_t>(first + i) + keys[1];
    for (int group = 0; group < 5; ++group) {
      for (int r : kRotations[group % 2]) {
        a += b;
        b = (b << r | b >> (32 - r)) ^ a;
      }
      a += keys[(group + 1) % 3];
      b += keys[(group + 2) % 3] + group + 1;
    }
    bits[i] = a ^ b;
  }
}

float normal(uint32_t bits) {
  // Uniform in (-1, 1).
  const uint32_t mantissa = bits >> 9 | 0x3f800000u;
  float u;
  std::memcpy(&u, &mantissa, 4);
  const float least = std::nextafter(-1.0f, 0.0f);
  u = std::max((u - 1.0f) * 2.0f + least, least);
  // Giles, "Approximating the erfinv function" (2012), for single precision.
  constexpr float kCentral[] = {2.81022636e-08f, 3.43273939e-07f,
                                -3.5233877e-06f, -4.39150654e-06f,
                                0.00021858087f,  -0.00125372503f,
                                -0.00417768164f, 0.246640727f, 1.50140941f};
  constexpr float kTail[] = {-0.000200214257f, 0.000100950558f, 0.00134934322f,
                             -0.00367342844f,  0.00573950773f,  -0.0076224613f,
                             0.00943887047f,   1.00167406f,     2.83297682f};
  const float w = -std::log1p(-u * u);
  const bool central = w < 5.0f;
  const float x = central ? w - 2.5f : std::sqrt(w) - 3.0f;
  float p = 0;
  for (float c : central ? kCentral : kTail) p = p * x + c;
  return std::sqrt(2.0f) * (p * u);
}

// Fills a box of each image with noise. y: [B, H, W, C]; boxes: [B, 4], top,
// left, height and width; indices: [B], the images' positions in the batch;
// keys: [strips, 2], of the strips of rows into which all images are divided.
ffi::Error FillWithNoise(ffi::ThreadPool pool, In, In boxes, In indices,
                         In keys, Out y) {
  const auto d = y->dimensions();
  const int64_t rows = d[1] / keys.dimensions()[0], row = d[2] * d[3];
  parallel_for(pool, d[0], [&](int64_t i) {
    const int32_t* box = data<int32_t>(boxes) + 4 * i;
    std::vector<uint32_t> bits(box[3] * d[3]);
    for (int64_t line = box[0]; line < box[0] + box[2]; ++line) {
      const uint64_t before = data<uint32_t>(indices)[i] * rows + line % rows;
      const int64_t left = box[1] * d[3];
      random_bits(data<uint32_t>(keys) + 2 * (line / rows), before * row + left,
                  bits.size(), bits.data());
      float* to = data<float>(y) + (i * d[1] + line) * row + left;
      std::transform(bits.begin(), bits.end(), to, normal);
    }
  });
  return ffi::Error::Success();
}

}  // namespace

CONVMIXER_OP(stages, ApplyStages, 6, 1);
CONVMIXER_OP(noise, FillWithNoise, 4, 1);
