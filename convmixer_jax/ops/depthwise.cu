// Depthwise convolution of bfloat16 images [B, H, W, C] on tensor cores, and its
// gradients. cuda.py compiles this file for one shape by NVRTC; so it includes
// nothing. Needs compute capability 8.0.
//
// `convolve`: for one channel, a 4 x 4 block of outputs is a product of the
// taps, as a Toeplitz matrix [16, window], with the block's window of inputs.
// With Q = ceil((K + 3) / 4), the window is Q x Q pieces of 4 x 4 pixels, each
// one mma.m16n8k16 for 8 blocks side by side. The taps stay in registers, and
// each piece of x is loaded once for the Q rows of blocks that need it.
// `kernel_grad`: for one channel, a product [window, blocks] x [blocks, 8] of x
// with 2 x 4 blocks of the gradient; tap (i, j) is the sum of the elements whose
// places differ by (i, j). The sums stay in registers for all images of a block
// of threads. A word holds two pixels, half a tile's height apart.
//
// Arithmetic for [64, 32, 32, 1536], K = 9, per 32 outputs. On an H100 the bytes
// alone (403 MB in 0.12 ms) allow 34 issue slots of a scheduler and 8.5 cycles of
// shared memory of an SM:
//                      convolve           kernel_grad
//   mma.m16n8k16       2.3 (15 cycles)    2.5 (16 cycles)
//   issue slots        20                 23
//   shared memory      5.5 cycles         5.4 cycles
// Scalar float32 multiply-adds would take 81 issue slots, plus conversions.
//
// Macros: BATCH, HEIGHT, WIDTH, CHANNELS (a multiple of 8), K; LOW: rows and
// columns of padding before the first one; FLIP: 1 rotates the kernel by half a
// turn; ROWS: rows of a tile of outputs, a multiple of 4; BLOCKS: 4-pixel blocks
// in a row of it, at most 8; IMAGES: images side by side in a tile, IMAGES *
// BLOCKS at most 8; OCTETS: 8-channel groups of a block of threads; PARTS: of
// the batch, see kernel_grad; BYTES: of shared memory.

#ifndef CUDA_EMULATOR

// d += a b, with a [16, 16] and b [16, 8] in bfloat16. Thread t of a warp has
//   a: rows t / 4 and t / 4 + 8, columns 2 (t % 4) + {0, 1}; then columns + 8
//   b: column t / 4, rows 2 (t % 4) + {0, 1}; then rows + 8
//   d: row t / 4, columns 2 (t % 4) + {0, 1}; then row + 8
static __device__ void mma(float (&d)[4], const unsigned (&a)[4], unsigned b0,
                           unsigned b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
      "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two numbers as bfloat16, `low` in the low half of the word.
static __device__ unsigned pack(float low, float high) {
  unsigned word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

// Brings a 32-byte sector to the L2 cache.
static __device__ void prefetch(const uint4* address) {
  asm volatile("prefetch.L2 [%0];" : : "l"(address));
}

#endif

constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr int C8 = CHANNELS / 8;
constexpr int Q = (K + 6) / 4;
constexpr int COLUMNS = IMAGES * BLOCKS;  // Blocks side by side in a tile.
constexpr int GROUPS = BLOCKS + Q - 1;    // 4-pixel groups in a row of inputs.
constexpr int TILES_X = (WIDTH + 4 * BLOCKS - 1) / (4 * BLOCKS);
constexpr int TILES_Y = (HEIGHT + ROWS - 1) / ROWS;
constexpr int LOW_HALVES = 0x5410, HIGH_HALVES = 0x7632, MIDDLE = 0x5432;
static_assert(COLUMNS <= 8 && ROWS % 4 == 0 && CHANNELS % 8 == 0, "");

static __device__ unsigned word(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// Channels 2i and 2i + 1 of two pixels a and b -> channel j's two pixels.
static __device__ unsigned channel(const uint4& a, const uint4& b, int j) {
  return __byte_perm(word(a, j / 2), word(b, j / 2),
                     j % 2 ? HIGH_HALVES : LOW_HALVES);
}

static __device__ long long offset(int image, int h, int w, int octet) {
  return (((long long)image * HEIGHT + h) * WIDTH + w) * C8 + octet;
}

// Eight channels of pixels (h, w), (h, w + 1), ...; zero outside of the array.
template <int N>
static __device__ void load(uint4 (&pixels)[N], const uint4* x, int image,
                            int h, int w, int octet) {
  const bool row = image < BATCH && 0 <= h && h < HEIGHT && octet < C8;
  x += offset(image, h, w, octet);
#pragma unroll
  for (int i = 0; i < N; i++) {
    pixels[i] = make_uint4(0, 0, 0, 0);
    if (row && 0 <= w + i && w + i < WIDTH) pixels[i] = x[i * C8];
  }
}

// The first pixel of block n in a row of a tile of inputs.
static __device__ int column(int n) {
  return n < COLUMNS ? (n / BLOCKS * GROUPS + n % BLOCKS) * 4 : 0;
}

#ifndef PARTS

// A row of a channel's plane in shared memory, in pixels: 16 more than a multiple
// of 32, so that four rows lie in different banks.
constexpr int STRIDE = (IMAGES * GROUPS * 4 + 15) / 32 * 32 + 16;
constexpr int PLANE = (ROWS + 4 * Q - 4) * STRIDE;
// The taps have a border of zeros.
constexpr int TAP_ROWS = 4 * Q + 3, TAP_COLUMNS = 4 * Q + 6;
constexpr int TAPS = TAP_ROWS * TAP_COLUMNS;
constexpr int CHANNELS_HERE = 8 * OCTETS;
static_assert(BYTES >= 2 * (CHANNELS_HERE * (PLANE + TAPS) + 32 * OCTETS), "");

// Where channel c's plane starts; octets lie in different banks.
static __device__ int plane(int c) { return c * PLANE + c / 8 * 32; }

// y[b,h,w,c] = sum over i, j of x[b,h+i-LOW,w+j-LOW,c] kernel[i,j,c].
// Grid: [channels, tiles, images].
extern "C" __global__ void __launch_bounds__(THREADS, Q < 4   ? 3
                                                      : Q < 5 ? 2
                                                              : 1)
    convolve(const uint4* __restrict__ x,
             const uint4* __restrict__ kernel, uint4* __restrict__ y) {
  extern __shared__ uint4 shared[];
  unsigned short* planes = reinterpret_cast<unsigned short*>(shared);
  unsigned short* taps = planes + plane(CHANNELS_HERE);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int first_octet = blockIdx.x * OCTETS, first_image = blockIdx.z * IMAGES;
  const int left = blockIdx.y % TILES_X * (4 * BLOCKS);
  const int top = blockIdx.y / TILES_X * ROWS;

  // Loads come before stores, so that several are under way at a time.
  constexpr int TAP_LOADS = (TAPS * OCTETS + THREADS - 1) / THREADS;
  uint4 tap[TAP_LOADS];
#pragma unroll
  for (int n = 0; n < TAP_LOADS; n++) {
    const int i = thread + n * THREADS, octet = first_octet + i % OCTETS;
    const int row = i / OCTETS / TAP_COLUMNS - 3;
    const int col = i / OCTETS % TAP_COLUMNS - 3, from = row * K + col;
    tap[n] = make_uint4(0, 0, 0, 0);
    if (0 <= row && row < K && 0 <= col && col < K && octet < C8) {
      tap[n] = kernel[(FLIP ? K * K - 1 - from : from) * C8 + octet];
    }
  }
#pragma unroll
  for (int n = 0; n < TAP_LOADS; n++) {
    const int i = thread + n * THREADS;
    unsigned short* to = taps + i % OCTETS * 8 * TAPS + i / OCTETS;
#pragma unroll
    for (int j = 0; j < 8 && i < TAPS * OCTETS; j++) {
      to[j * TAPS] = word(tap[n], j / 2) >> j % 2 * 16;
    }
  }

  // Inputs, transposed to one plane a channel; two groups of pixels at a time.
  constexpr int IN_ROW = IMAGES * GROUPS * OCTETS;
  constexpr int IN = (ROWS + 4 * Q - 4) * IN_ROW;
  for (int first = thread; first < IN; first += 2 * THREADS) {
    uint4 pixels[2][4];
#pragma unroll
    for (int n = 0; n < 2; n++) {
      const int i = first + n * THREADS, group = i % IN_ROW / OCTETS;
      load(pixels[n], x, i < IN ? first_image + group / GROUPS : BATCH,
           top + i / IN_ROW - LOW, left + group % GROUPS * 4 - LOW,
           first_octet + i % OCTETS);
    }
#pragma unroll
    for (int n = 0; n < 2; n++) {
      const int i = first + n * THREADS, group = i % IN_ROW / OCTETS;
      if (i >= IN) break;
      unsigned short* to = planes + i / IN_ROW * STRIDE + group * 4;
#pragma unroll
      for (int j = 0; j < 8; j++) {
        *reinterpret_cast<uint2*>(to + plane(i % OCTETS * 8 + j)) =
            make_uint2(channel(pixels[n][0], pixels[n][1], j),
                       channel(pixels[n][2], pixels[n][3], j));
      }
    }
  }
  __syncthreads();

  // Each warp computes its channels and writes them over their inputs.
  const int t = lane % 4, m = lane / 4;
  for (int c = warp; c < CHANNELS_HERE; c += WARPS) {
    // Row m is output (m / 2, 2 (m % 2)), row m + 8 its right neighbour. Thread
    // t's four columns of piece (r, s) are inputs (4 r + t, 4 s + {0, 1, 2, 3}).
    unsigned a[Q][Q][4];
#pragma unroll
    for (int r = 0; r < Q; r++) {
      const unsigned* from = reinterpret_cast<const unsigned*>(
          taps + c * TAPS + (4 * r + t - m / 2 + 3) * TAP_COLUMNS +
          2 * (1 - m % 2));
#pragma unroll
      for (int s = 0; s < Q; s++) {
        a[r][s][1] = from[2 * s];
        a[r][s][3] = from[2 * s + 1];
        a[r][s][0] = __byte_perm(from[2 * s], from[2 * s + 1], MIDDLE);
        a[r][s][2] = __byte_perm(from[2 * s + 1], from[2 * s + 2], MIDDLE);
      }
    }
    const unsigned short* from = planes + plane(c) + t * STRIDE + column(m);
    unsigned short* to =
        planes + plane(c) + m / 2 * STRIDE + column(2 * t) + m % 2 * 2;
    unsigned short* to_next = to - column(2 * t) + column(2 * t + 1);
    float sums[Q][4];
#pragma unroll
    for (int in = 0; in < ROWS / 4 + Q - 1; in++) {
      uint2 b[Q];
#pragma unroll
      for (int s = 0; s < Q; s++) {
        b[s] = *reinterpret_cast<const uint2*>(from + in * 4 * STRIDE + 4 * s);
      }
#pragma unroll
      for (int r = 0; r < Q; r++) {
        const int out = in - r;
        if (out < 0 || out >= ROWS / 4) continue;
        float(&sum)[4] = sums[out % Q];
        if (r == 0) sum[0] = sum[1] = sum[2] = sum[3] = 0;
#pragma unroll
        for (int s = 0; s < Q; s++) mma(sum, a[r][s], b[s].x, b[s].y);
      }
      const int out = in - Q + 1;
      if (out < 0) continue;
      const float(&sum)[4] = sums[out % Q];
      __syncwarp();  // All have read this row of blocks.
      if (2 * t < COLUMNS) {
        *reinterpret_cast<unsigned*>(to + out * 4 * STRIDE) =
            pack(sum[0], sum[2]);
      }
      if (2 * t + 1 < COLUMNS) {
        *reinterpret_cast<unsigned*>(to_next + out * 4 * STRIDE) =
            pack(sum[1], sum[3]);
      }
    }
  }
  __syncthreads();

  constexpr int OUT_ROW = COLUMNS * OCTETS;
  for (int i = thread; i < ROWS * OUT_ROW; i += THREADS) {
    const int row = i / OUT_ROW, block = i % OUT_ROW / OCTETS;
    const int octet = i % OCTETS, image = first_image + block / BLOCKS;
    const int h = top + row, w = left + block % BLOCKS * 4;
    if (h >= HEIGHT || image >= BATCH || first_octet + octet >= C8) continue;
    uint2 v[8];
#pragma unroll
    for (int j = 0; j < 8; j++) {
      v[j] = *reinterpret_cast<const uint2*>(planes + plane(octet * 8 + j) +
                                             row * STRIDE + column(block));
    }
    uint4* to = y + offset(image, h, w, first_octet + octet);
#pragma unroll
    for (int p = 0; p < 4; p++) {
      unsigned pixel[4];
#pragma unroll
      for (int j = 0; j < 4; j++) {
        pixel[j] = __byte_perm(p < 2 ? v[2 * j].x : v[2 * j].y,
                               p < 2 ? v[2 * j + 1].x : v[2 * j + 1].y,
                               p % 2 ? HIGH_HALVES : LOW_HALVES);
      }
      if (w + p < WIDTH) {
        to[p * C8] = make_uint4(pixel[0], pixel[1], pixel[2], pixel[3]);
      }
    }
  }
}

#else

constexpr int HALF = ROWS / 2;
constexpr int PAIRS = (K + 2) / 2;   // Pairs of rows of a block's window.
constexpr int PIECES = (K + 10) / 8;  // 8-column pieces of them.
constexpr int X_ROWS = HALF + 2 * PAIRS - 2, X_STRIDE = IMAGES * GROUPS * 4;
constexpr int X_PLANE = X_ROWS * X_STRIDE, PLANE = X_PLANE + HALF * 32;
constexpr int SUMS = PAIRS * PIECES * 16 * 8;
constexpr int UNITS = TILES_X * TILES_Y * ((BATCH + IMAGES - 1) / IMAGES);
static_assert(BYTES >= 4 * (8 * OCTETS * PLANE + 16 * OCTETS) &&
                  BYTES >= 4 * WARPS * SUMS, "");

static __device__ int plane(int c) { return c * PLANE + c / 8 * 16; }

// Eight channels of pixels (h, w + {0, 1}), each a word with the pixel HALF rows
// below, to `to` of each channel's plane. Four would not fit into registers.
static __device__ void stage(unsigned* to, const uint4* x, int image, int h,
                             int w, int octet) {
  uint4 upper[2], lower[2];
  load(upper, x, image, h, w, octet);
  load(lower, x, image, h + HALF, w, octet);
#pragma unroll
  for (int j = 0; j < 8; j++) {
    *reinterpret_cast<uint2*>(to + j * PLANE) = make_uint2(
        channel(upper[0], lower[0], j), channel(upper[1], lower[1], j));
  }
}

// parts[p,i,j,c] = sum over b, h, w of x[b,h+i-LOW,w+j-LOW,c] grad[b,h,w,c].
// p: PARTS parts of all tiles. The order of each sum is fixed.
// Grid: [channels, PARTS].
extern "C" __global__ void __launch_bounds__(THREADS, K < 14 ? 2 : 1)
    kernel_grad(const uint4* __restrict__ x, const uint4* __restrict__ grad,
                float* __restrict__ parts) {
  extern __shared__ uint4 shared[];
  unsigned* planes = reinterpret_cast<unsigned*>(shared);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int t = lane % 4, m = lane / 4, first_octet = blockIdx.x * OCTETS;

  float sums[OCTETS][PAIRS][PIECES][4];
#pragma unroll
  for (int i = 0; i < OCTETS * PAIRS * PIECES * 4; i++) {
    sums[i / 4 / PIECES / PAIRS][i / 4 / PIECES % PAIRS][i / 4 % PIECES][i % 4] =
        0;
  }

  for (int unit = blockIdx.y; unit < UNITS; unit += PARTS) {
    const int tile = unit % (TILES_X * TILES_Y);
    const int first_image = unit / (TILES_X * TILES_Y) * IMAGES;
    const int left = tile % TILES_X * (4 * BLOCKS), top = tile / TILES_X * ROWS;
    constexpr int X_ROW = X_STRIDE / 2 * OCTETS, GRAD_ROW = 16 * OCTETS;
    __syncthreads();
    for (int i = thread; i < X_ROWS * X_ROW; i += THREADS) {
      const int row = i / X_ROW, octet = i % OCTETS;
      const int col = i % X_ROW / OCTETS * 2, image = col / (4 * GROUPS);
      stage(planes + plane(octet * 8) + row * X_STRIDE + col, x,
            first_image + image, top + row - LOW,
            left + col % (4 * GROUPS) - LOW, first_octet + octet);
    }
    for (int i = thread; i < HALF * GRAD_ROW; i += THREADS) {
      const int row = i / GRAD_ROW, octet = i % OCTETS;
      const int col = i % GRAD_ROW / OCTETS * 2, image = col / (4 * BLOCKS);
      stage(planes + plane(octet * 8) + X_PLANE + row * 32 + col, grad,
            image < IMAGES ? first_image + image : BATCH, top + row,
            left + col % (4 * BLOCKS), first_octet + octet);
    }
    __syncthreads();

    // The next tile comes from memory while this one is computed.
    const int next = unit + PARTS;
    for (int i = thread; i < ROWS * 4 * COLUMNS && next < UNITS; i += THREADS) {
      const int tile = next % (TILES_X * TILES_Y), block = i / 4 % COLUMNS;
      const int image = next / (TILES_X * TILES_Y) * IMAGES + block / BLOCKS;
      const int h = tile / TILES_X * ROWS + i / 4 / COLUMNS;
      const int w = (tile % TILES_X * BLOCKS + block % BLOCKS) * 4 + i % 4;
      if (image < BATCH && h < HEIGHT && w < WIDTH) {
        prefetch(x + offset(image, h, w, first_octet));
        prefetch(grad + offset(image, h, w, first_octet));
      }
    }

#pragma unroll
    for (int octet = 0; octet < OCTETS; octet++) {
      // Row m of a is place (0, m) of a piece of the window, row m + 8 is (1, m).
      // Column m of b is place (m / 4, m % 4) of the block. Thread t's sums run
      // over blocks t and t + 4, each in the upper and the lower half.
      const unsigned* x_plane = planes + plane(octet * 8 + warp) + m;
      const unsigned* left_block = x_plane + column(t);
      const unsigned* right_block = x_plane + column(t + 4);
      const unsigned* grad_block =
          planes + plane(octet * 8 + warp) + X_PLANE + 4 * t + m / 4 * 32 + m % 4;
      // The outer loop is not unrolled: the compiler would load ahead and spill.
      constexpr int STEPS = HALF / 2 + PAIRS - 1;
      unsigned b[PAIRS][2];
#pragma unroll 1
      for (int first = 0; first < STEPS; first += PAIRS) {
#pragma unroll
        for (int step = 0; step < PAIRS; step++) {
          const int in = first + step;
          if (in >= STEPS) break;
          if (in < HALF / 2) {
            b[step][0] = grad_block[in * 64];
            b[step][1] = grad_block[in * 64 + 16];
          }
          unsigned a[PIECES][4];
#pragma unroll
          for (int s = 0; s < PIECES; s++) {
            const int at = in * 2 * X_STRIDE + 8 * s;
            a[s][0] = left_block[at];
            a[s][1] = left_block[at + X_STRIDE];
            a[s][2] = right_block[at];
            a[s][3] = right_block[at + X_STRIDE];
          }
#pragma unroll
          for (int r = 0; r < PAIRS; r++) {
            if (in < r || in - r >= HALF / 2) continue;
            const unsigned(&column)[2] = b[(step - r + PAIRS) % PAIRS];
#pragma unroll
            for (int s = 0; s < PIECES; s++) {
              mma(sums[octet][r][s], a[s], column[0], column[1]);
            }
          }
        }
      }
    }
  }

  // sum[h][w][n]: place (h, w) of the window times place n of the block.
  __syncthreads();
  float* sum = reinterpret_cast<float*>(shared) + warp * SUMS;
#pragma unroll
  for (int octet = 0; octet < OCTETS; octet++) {
#pragma unroll
    for (int r = 0; r < 2 * PAIRS; r++) {
#pragma unroll
      for (int s = 0; s < PIECES; s++) {
        const float(&from)[4] = sums[octet][r / 2][s];
        float* to = sum + ((r * PIECES + s) * 8 + m) * 8 + 2 * t;
        to[0] = from[r % 2 * 2];
        to[1] = from[r % 2 * 2 + 1];
      }
    }
    __syncwarp();
    const int c = (first_octet + octet) * 8 + warp;
    for (int tap = lane; tap < K * K && c < CHANNELS; tap += 32) {
      const int i = tap / K, j = tap % K;
      float total = 0;
#pragma unroll
      for (int n = 0; n < 8; n++) {
        total += sum[((i + n / 4) * PIECES * 8 + j + n % 4) * 8 + n];
      }
      parts[((long long)blockIdx.y * K * K + tap) * CHANNELS + c] = total;
    }
    __syncwarp();
  }
}

#endif
