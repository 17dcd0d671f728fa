// Runs a CUDA kernel on the CPU, one block at a time, each thread as a fiber:
// g++ -x c++ -include cuda_emulator.h kernel.cu. `emulate` launches a kernel.
#define CUDA_EMULATOR
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#define __global__
#define __device__
#define __shared__
#define __restrict__
#define __launch_bounds__(...)

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
};
static uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
  return {x, y, z, w};
}

uint4 shared[1 << 14];
static dim3 threadIdx, blockIdx;

namespace emulator {

struct Barrier {
  unsigned size, arrived, passed;
};
struct Warp {
  Barrier barrier;
  unsigned a[32][4], b[32][2];
};
struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  bool done;
  bool waits;  // For the other warps of its block.
  unsigned before;
};
using Kernel = void (*)(void*, void*, void*);

static ucontext_t scheduler;
static std::vector<Fiber> fibers;
static std::vector<Warp> warps;
static Barrier block;
static Kernel kernel;
static void* args[3];

static void wait(Barrier& barrier) {
  Fiber& fiber = fibers[threadIdx.x];
  const unsigned before = fiber.before = barrier.passed;
  fiber.waits = &barrier == &block;
  if (++barrier.arrived == barrier.size) {
    barrier.arrived = 0;
    barrier.passed++;
  }
  while (barrier.passed == before) {
    swapcontext(&fiber.context, &scheduler);
  }
  fiber.waits = false;
}

// Runs a warp until all its threads wait for other warps or are done, so that
// warps are as far apart as the program allows.
static void run_warp(unsigned first) {
  for (bool running = true; running;) {
    running = false;
    for (unsigned t = first; t < first + 32; t++) {
      const Fiber& fiber = fibers[t];
      if (fiber.done || (fiber.waits && fiber.before == block.passed)) continue;
      running = true;
      threadIdx = {t, 0, 0};
      swapcontext(&scheduler, &fibers[t].context);
    }
  }
}

static void run_thread() {
  kernel(args[0], args[1], args[2]);
  fibers[threadIdx.x].done = true;
  swapcontext(&fibers[threadIdx.x].context, &scheduler);
}

static float widen(unsigned word, int half) {
  word = half ? word & 0xffff0000u : word << 16;
  float value;
  memcpy(&value, &word, 4);
  return value;
}

static unsigned narrow(float value) {
  unsigned word;
  memcpy(&word, &value, 4);
  return (word + 0x7fff + (word >> 16 & 1)) >> 16;  // To the nearest even.
}

}  // namespace emulator

static void __syncthreads() { emulator::wait(emulator::block); }
static void __syncwarp() {
  emulator::wait(emulator::warps[threadIdx.x / 32].barrier);
}

static unsigned __byte_perm(unsigned x, unsigned y, unsigned select) {
  const uint64_t bytes = (uint64_t)y << 32 | x;
  unsigned word = 0;
  for (int i = 0; i < 4; i++) {
    word |= (bytes >> 8 * (select >> 4 * i & 7) & 255) << 8 * i;
  }
  return word;
}

static unsigned pack(float low, float high) {
  return emulator::narrow(low) | emulator::narrow(high) << 16;
}

static void prefetch(const uint4* address) { (void)*(volatile unsigned*)address; }

// mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32, as the PTX manual says
// which thread has which elements.
static void mma(float (&d)[4], const unsigned (&a)[4], unsigned b0,
                unsigned b1) {
  emulator::Warp& warp = emulator::warps[threadIdx.x / 32];
  const int lane = threadIdx.x % 32;
  memcpy(warp.a[lane], a, sizeof a);
  warp.b[lane][0] = b0;
  warp.b[lane][1] = b1;
  __syncwarp();
  for (int i = 0; i < 4; i++) {
    const int row = lane / 4 + i / 2 * 8, col = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; k++) {
      const unsigned(&from_a)[4] = warp.a[row % 8 * 4 + k % 8 / 2];
      const unsigned(&from_b)[2] = warp.b[col * 4 + k % 8 / 2];
      d[i] += emulator::widen(from_a[row / 8 + k / 8 * 2], k % 2) *
              emulator::widen(from_b[k / 8], k % 2);
    }
  }
  __syncwarp();
}

extern "C" void emulate(emulator::Kernel kernel, unsigned x, unsigned y,
                        unsigned z, unsigned threads, unsigned bytes,
                        void* first, void* second, void* third) {
  using namespace emulator;
  if (bytes > sizeof shared) abort();
  emulator::kernel = kernel;
  args[0] = first, args[1] = second, args[2] = third;
  fibers.resize(threads);
  warps.resize(threads / 32);
  for (unsigned i = 0; i < x * y * z; i++) {
    blockIdx = {i % x, i / x % y, i / x / y};
    memset(shared, 0xff, sizeof shared);  // NaN, if it is read before a store.
    block = {threads, 0, 0};
    for (Warp& warp : warps) warp.barrier = {32, 0, 0};
    for (Fiber& fiber : fibers) {
      fiber.done = fiber.waits = false;
      fiber.stack.resize(1 << 16);
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.data();
      fiber.context.uc_stack.ss_size = fiber.stack.size();
      makecontext(&fiber.context, run_thread, 0);
    }
    for (bool running = true; running;) {
      for (unsigned n = 0; n < threads / 32; n++) {
        run_warp((i % 2 ? threads / 32 - 1 - n : n) * 32);
      }
      running = false;
      for (const Fiber& fiber : fibers) running |= !fiber.done;
    }
  }
}
