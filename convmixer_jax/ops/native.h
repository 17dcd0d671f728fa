// What native.cc and augment.cc share: XLA's threads and calling convention.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#if defined(__AVX__)
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

// --- Threads: XLA's.

// Calls task(0) ... task(n - 1) on XLA's threads and on this one; returns when
// all are done. If the other threads are busy, this one does all the tasks. A
// thread that starts too late finds no task left and does not touch `task`,
// which may be gone. `noexcept`: if a task runs out of memory, the process
// ends, because the other threads may still use what an exception would free.
template <class Task>
void parallel_for(ffi::ThreadPool& pool, int64_t n, const Task& task) noexcept {
  struct Progress {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto progress = std::make_shared<Progress>();
  auto work = [progress, n, &task] {
    for (int64_t i; (i = progress->next.fetch_add(1)) < n;) {
      task(i);
#if defined(__AVX__)
      _mm_sfence();  // `done` does not order streaming stores.
#endif
      progress->done.fetch_add(1, std::memory_order_release);
    }
  };
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), n) - 1;
  for (int64_t i = 0; i < helpers; ++i) {
    pool.Schedule(std::function<void()>(work));
  }
  work();
  while (progress->done.load(std::memory_order_acquire) < n) {
    std::this_thread::yield();
  }
}

// This thread's scratch memory: at least `floats` floats, aligned to a cache
// line.
float* scratch(size_t floats) {
  static thread_local std::vector<float> memory;
  if (memory.size() < floats + 16) memory.resize(floats + 16);
  const auto address = reinterpret_cast<uintptr_t>(memory.data());
  return reinterpret_cast<float*>((address + 63) & ~uintptr_t{63});
}

// --- XLA's calling convention.

template <class T>
T* data(ffi::AnyBuffer& x) {
  return static_cast<T*>(x.untyped_data());
}
template <class T>
T* data(ffi::Result<ffi::AnyBuffer>& x) {
  return static_cast<T*>(x->untyped_data());
}

using In = ffi::AnyBuffer;
using Out = ffi::Result<ffi::AnyBuffer>;

// The FFI binding of a function with the given numbers of arrays as arguments
// and results. It recurses, because each step makes a binding of another type,
// which can be neither copied nor assigned.
template <int args, int results, class Binding>
auto with_arrays(Binding&& binding) {
  if constexpr (args > 0) {
    return with_arrays<args - 1, results>(std::move(binding).template Arg<In>());
  } else if constexpr (results > 1) {
    return with_arrays<0, results - 1>(std::move(binding).template Ret<In>());
  } else {
    return std::move(binding).template Ret<In>();
  }
}

}  // namespace

#define CONVMIXER_OP(name, function, args, results, ...)            \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(                                    \
      convmixer_##name, function,                                   \
      (with_arrays<args, results>(                                  \
          ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()) __VA_ARGS__))
