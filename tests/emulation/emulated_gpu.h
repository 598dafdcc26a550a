// Runs CUDA kernels on the CPU, thread by thread, so that the lines of *_gpu.cu are executed where there is no GPU.
//
// g++ compiles a .cu file as C++ with EMULATED_GPU; csrc/kernel.h then includes this file instead of CUDA's headers.
// Each thread of a block is a fiber with its own stack. Fibers run one at a time until they return or come to a barrier
// or a warp primitive; when all threads concerned have come there, they go on. So that tests find what a real GPU
// shows now and then:
//   - blocks, and the threads of each block, run in a shuffled order (the same in every run);
//   - all __shared__ memory holds 0xff bytes (NaN, -1) when a block starts;
//   - misaligned accesses and indices outside of arrays are errors (with -fsanitize=alignment,bounds);
//   - so are barriers that some threads never reach, different barriers at once, shuffles from threads that returned.
// Errors arrive in Python as RuntimeError with the line of the .cu file. Not emulated: 2-D and 3-D launches, dynamic
// shared memory, streams, memory fences, textures, tensor cores.
#pragma once

#include <link.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <csetjmp>
#include <cstring>
#include <mutex>
#include <random>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
// Variables of the thread that launches: one place for all fibers, which `emulated::shared_memory` finds.
#define __shared__ static thread_local

namespace emulated {

constexpr int kWarp = 32, kMostThreads = 1024;
constexpr size_t kPage = 4096, kStack = 16 * kPage;

struct Index {
  unsigned x, y, z;
};

enum class State { kReady, kAtBarrier, kAtWarp, kDone };

// What a thread waits for: the primitive and its line. Threads that wait together must agree on both.
struct Place {
  const char* primitive = "";
  int line = 0;
  bool operator!=(const Place& other) const { return line != other.line || strcmp(primitive, other.primitive) != 0; }
};

struct Fiber {
  jmp_buf at;
  State state = State::kDone;
  Place place;
  uint64_t given = 0;  // to the barrier or warp primitive
  bool started = false;
};

inline Index thread_index{}, block_index{}, block_size{}, grid_size{};

// The bytes of all __shared__ variables of this library, as {begin, size}.
inline std::pair<char*, size_t> shared_memory() {
  [[maybe_unused]] static thread_local char touched;  // makes the loader allocate the library's thread-local memory
  touched = 0;
  std::pair<char*, size_t> found{nullptr, 0};
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* result) {
        const char* first = nullptr;
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const auto& part = info->dlpi_phdr[i];
          const char* begin = reinterpret_cast<const char*>(info->dlpi_addr + part.p_vaddr);
          const char* here = reinterpret_cast<const char*>(&thread_index);
          if (part.p_type == PT_LOAD && here >= begin && here < begin + part.p_memsz) first = begin;
        }
        for (int i = 0; first && i < info->dlpi_phnum; ++i) {
          if (info->dlpi_phdr[i].p_type != PT_TLS) continue;
          *static_cast<std::pair<char*, size_t>*>(result) = {static_cast<char*>(info->dlpi_tls_data),
                                                             info->dlpi_phdr[i].p_memsz};
        }
        return first ? 1 : 0;
      },
      &found);
  return found;
}

// The one GPU of this library: runs a launch to its end.
class Machine {
 public:
  static Machine& get() {
    static Machine machine;
    return machine;
  }

  // Calls `thread()` for every thread of every block.
  template <typename F>
  void run(unsigned blocks, int threads, F thread) {
    static std::mutex one_launch;
    const std::lock_guard<std::mutex> lock(one_launch);
    STD_TORCH_CHECK(threads > 0 && threads <= kMostThreads, "a block of ", threads, " threads: 1 to 1024 are possible");
    call_ = [](void* f) { (*static_cast<F*>(f))(); };
    thread_ = &thread;
    block_size = {static_cast<unsigned>(threads), 1, 1};
    grid_size = {blocks, 1, 1};
    random_.seed(blocks + threads);
    std::vector<unsigned> order(blocks);
    for (unsigned i = 0; i < blocks; ++i) order[i] = i;
    shuffle(order);
    const auto shared = shared_memory();
    for (unsigned block : order) {
      block_index = {block, 0, 0};
      if (shared.first) memset(shared.first, 0xff, shared.second);
      run_block(threads);
    }
  }

  // Called by a thread: waits with the others; returns when they have all come.
  void wait(State state, Place place, uint64_t given) {
    Fiber& fiber = fibers_[current_];
    fiber.state = state;
    fiber.place = place;
    fiber.given = given;
    leave();
  }

  // Called by a thread: ends the launch with this message.
  [[noreturn]] void fail(std::string message) {
    error_ = std::move(message);
    leave();
    __builtin_unreachable();
  }

  bool in_kernel() const { return running_; }
  int lane() const { return static_cast<int>(thread_index.x % kWarp); }
  // What the threads gave to the warp primitive, and which of them (a bit each).
  uint64_t given(int lane) const { return warp_given_[thread_index.x / kWarp][lane]; }
  uint32_t present() const { return warp_present_[thread_index.x / kWarp]; }
  // How many threads gave not 0 to the barrier, and how many came.
  int barrier_true() const { return barrier_true_; }
  int barrier_all() const { return barrier_all_; }

 private:
  Machine() : fibers_(kMostThreads) {
    const size_t each = kStack + kPage;  // with an inaccessible page below each stack
    void* memory = mmap(nullptr, each * kMostThreads, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    STD_TORCH_CHECK(memory != MAP_FAILED, "no memory for the stacks of the emulated GPU");
    stacks_ = static_cast<char*>(memory);
    for (int i = 0; i < kMostThreads; ++i) mprotect(stacks_ + i * each, kPage, PROT_NONE);
  }

  void shuffle(std::vector<unsigned>& order) {
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random_() % i]);
  }

  // A fiber lives on from block to block; it runs one thread each time.
  static void body() {
    Machine& machine = get();
    while (true) {
      machine.call_(machine.thread_);
      machine.fibers_[machine.current_].state = State::kDone;
      machine.leave();
    }
  }

  void leave() {
    if (_setjmp(fibers_[current_].at) == 0) _longjmp(scheduler_, 1);
  }

  void enter(unsigned index) {
    current_ = index;
    thread_index = {index, 0, 0};
    if (_setjmp(scheduler_) != 0) return;
    Fiber& fiber = fibers_[index];
    if (fiber.started) _longjmp(fiber.at, 1);
    fiber.started = true;
    getcontext(&start_);
    start_.uc_stack.ss_sp = stacks_ + index * (kStack + kPage) + kPage;
    start_.uc_stack.ss_size = kStack;
    start_.uc_link = nullptr;
    makecontext(&start_, &Machine::body, 0);
    setcontext(&start_);
  }

  void run_block(int threads) {
    std::vector<unsigned> order(threads);
    for (int i = 0; i < threads; ++i) {
      order[i] = i;
      fibers_[i].state = State::kReady;
    }
    shuffle(order);
    for (bool more = true; more; more = release(threads)) {
      for (unsigned index : order) {
        if (fibers_[index].state != State::kReady) continue;
        running_ = true;
        enter(index);
        running_ = false;
        if (!error_.empty()) stop("thread " + std::to_string(index) + ": " + error_);
      }
    }
  }

  // Lets those go on who have come together; false when all threads have returned.
  bool release(int threads) {
    bool released = false, left = false;
    int waiting = 0;
    barrier_true_ = barrier_all_ = 0;
    Place barrier;
    for (int warp = 0; warp * kWarp < threads; ++warp) {
      uint32_t at_warp = 0, alive = 0;
      Place place;
      for (int lane = 0; lane < kWarp && warp * kWarp + lane < threads; ++lane) {
        const Fiber& fiber = fibers_[warp * kWarp + lane];
        if (fiber.state == State::kDone) continue;
        alive |= 1u << lane;
        ++waiting;
        if (fiber.state == State::kAtWarp) {
          if (at_warp && fiber.place != place) stop(differ("a warp", place, fiber.place));
          at_warp |= 1u << lane;
          place = fiber.place;
        } else {
          if (barrier_all_ && fiber.place != barrier) stop(differ("a block", barrier, fiber.place));
          barrier = fiber.place;
          ++barrier_all_;
          barrier_true_ += fiber.given != 0;
        }
      }
      left = left || alive;
      if (!at_warp || at_warp != alive) continue;
      warp_present_[warp] = alive;
      for (int lane = 0; lane < kWarp; ++lane) {
        if (!(alive >> lane & 1)) continue;
        Fiber& fiber = fibers_[warp * kWarp + lane];
        warp_given_[warp][lane] = fiber.given;
        fiber.state = State::kReady;
      }
      released = true;
    }
    if (!left || released) return left;
    if (barrier_all_ < waiting) stop(stuck(threads));
    for (int i = 0; i < threads; ++i) {
      if (fibers_[i].state == State::kAtBarrier) fibers_[i].state = State::kReady;
    }
    return true;
  }

  static std::string text(const Place& place) {
    return std::string(place.primitive) + " in line " + std::to_string(place.line);
  }

  static std::string differ(const char* who, const Place& a, const Place& b) {
    return std::string("threads of ") + who + " wait at different places: " + text(a) + ", " + text(b);
  }

  std::string stuck(int threads) const {
    std::string message = "threads wait for each other for ever:";
    for (int i = 0, told = 0; i < threads && told < 6; ++i) {
      if (fibers_[i].state == State::kDone) continue;
      message += (told++ ? ", " : " ") + std::to_string(i) + " at " + text(fibers_[i].place);
    }
    return message;
  }

  // Ends the launch; the fibers' stacks are given up as they are.
  [[noreturn]] void stop(const std::string& message) {
    for (Fiber& fiber : fibers_) fiber.started = false;
    error_.clear();
    STD_TORCH_CHECK(false, "emulated GPU, block ", block_index.x, " of ", grid_size.x, ": ", message);
    __builtin_unreachable();
  }

  std::vector<Fiber> fibers_;
  char* stacks_ = nullptr;
  ucontext_t start_;
  jmp_buf scheduler_;
  unsigned current_ = 0;
  bool running_ = false;
  std::mt19937 random_;
  std::string error_;
  void (*call_)(void*) = nullptr;
  void* thread_ = nullptr;
  uint64_t warp_given_[kMostThreads / kWarp][kWarp] = {};
  uint32_t warp_present_[kMostThreads / kWarp] = {};
  int barrier_true_ = 0, barrier_all_ = 0;
};

inline void at_barrier(const char* name, int line, bool given = false) {
  Machine::get().wait(State::kAtBarrier, {name, line}, given);
}

inline void at_warp(const char* name, int line, unsigned mask, uint64_t given) {
  Machine& machine = Machine::get();
  if (mask != 0xffffffffu) machine.fail(std::string(name) + " with a mask other than 0xffffffff");
  machine.wait(State::kAtWarp, {name, line}, given);
}

// The value that lane `from` gave; a lane outside of its group of `width` gets its own.
template <typename T>
T shuffled(const char* name, int line, unsigned mask, T value, int from, int width) {
  static_assert(std::is_arithmetic_v<T>, "CUDA shuffles numbers");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  at_warp(name, line, mask, bits);
  Machine& machine = Machine::get();
  const int lane = machine.lane();
  if (from < lane / width * width || from >= (lane / width + 1) * width) from = lane;
  if (!(machine.present() >> from & 1)) {
    machine.fail(std::string(name) + " in line " + std::to_string(line) + " reads from lane " + std::to_string(from) +
                 ", which has returned or does not exist");
  }
  bits = machine.given(from);
  memcpy(&value, &bits, sizeof(T));
  return value;
}

inline uint32_t voted(const char* name, int line, unsigned mask, bool vote) {
  at_warp(name, line, mask, vote);
  Machine& machine = Machine::get();
  uint32_t votes = 0;
  for (int lane = 0; lane < kWarp; ++lane) {
    if (machine.present() >> lane & 1) votes |= static_cast<uint32_t>(machine.given(lane)) << lane;
  }
  return votes;
}

}  // namespace emulated

// CUDA's names. `line` is where they are called.
inline constexpr int warpSize = emulated::kWarp;
inline auto &threadIdx = emulated::thread_index, &blockIdx = emulated::block_index;
inline auto &blockDim = emulated::block_size, &gridDim = emulated::grid_size;
using std::max;
using std::min;

inline void __syncthreads(int line = __builtin_LINE()) { emulated::at_barrier("__syncthreads", line); }
inline int __syncthreads_count(int given, int line = __builtin_LINE()) {
  emulated::at_barrier("__syncthreads_count", line, given != 0);
  return emulated::Machine::get().barrier_true();
}
inline int __syncthreads_or(int given, int line = __builtin_LINE()) {
  emulated::at_barrier("__syncthreads_or", line, given != 0);
  return emulated::Machine::get().barrier_true() > 0;
}
inline int __syncthreads_and(int given, int line = __builtin_LINE()) {
  emulated::at_barrier("__syncthreads_and", line, given != 0);
  return emulated::Machine::get().barrier_true() == emulated::Machine::get().barrier_all();
}
inline void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE()) {
  emulated::at_warp("__syncwarp", line, mask, 0);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int from, int width = warpSize, int line = __builtin_LINE()) {
  const int lane = emulated::Machine::get().lane();
  return emulated::shuffled("__shfl_sync", line, mask, value, lane / width * width + (from & (width - 1)), width);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = warpSize, int line = __builtin_LINE()) {
  const int from = emulated::Machine::get().lane() ^ bits;
  return emulated::shuffled("__shfl_xor_sync", line, mask, value, from, width);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = warpSize, int line = __builtin_LINE()) {
  const int from = emulated::Machine::get().lane() - static_cast<int>(by);
  return emulated::shuffled("__shfl_up_sync", line, mask, value, from, width);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = warpSize, int line = __builtin_LINE()) {
  const int from = emulated::Machine::get().lane() + static_cast<int>(by);
  return emulated::shuffled("__shfl_down_sync", line, mask, value, from, width);
}
inline unsigned __ballot_sync(unsigned mask, int vote, int line = __builtin_LINE()) {
  return emulated::voted("__ballot_sync", line, mask, vote != 0);
}
inline int __any_sync(unsigned mask, int vote, int line = __builtin_LINE()) {
  return emulated::voted("__any_sync", line, mask, vote != 0) != 0;
}
inline int __all_sync(unsigned mask, int vote, int line = __builtin_LINE()) {
  return emulated::voted("__all_sync", line, mask, vote != 0) == emulated::Machine::get().present();
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64; }

template <typename T>
T __ldg(const T* from) {
  return *from;
}

// The types for which CUDA has them; each returns what was there before.
#define EMULATED_ATOMIC(name, type, result) \
  inline type name(type* at, type value) {  \
    const type before = *at;                \
    *at = result;                           \
    return before;                          \
  }
#define EMULATED_ATOMIC_INTEGERS(name, result) \
  EMULATED_ATOMIC(name, int, result)           \
  EMULATED_ATOMIC(name, unsigned, result)      \
  EMULATED_ATOMIC(name, unsigned long long, result)
EMULATED_ATOMIC_INTEGERS(atomicAdd, before + value)
EMULATED_ATOMIC_INTEGERS(atomicMax, before > value ? before : value)
EMULATED_ATOMIC_INTEGERS(atomicMin, before < value ? before : value)
EMULATED_ATOMIC_INTEGERS(atomicOr, before | value)
EMULATED_ATOMIC_INTEGERS(atomicAnd, before& value)
EMULATED_ATOMIC_INTEGERS(atomicExch, value)
EMULATED_ATOMIC(atomicMax, long long, before > value ? before : value)
EMULATED_ATOMIC(atomicMin, long long, before < value ? before : value)
#undef EMULATED_ATOMIC_INTEGERS
#undef EMULATED_ATOMIC

namespace detcore {

// The same interface as csrc/kernel.h's.
class OnDevice {
 public:
  explicit OnDevice(const torch::stable::Tensor&) {}
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  template <typename... Parameters, typename... Arguments>
  void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, Arguments... arguments) const {
    STD_TORCH_CHECK(blocks <= std::numeric_limits<int>::max(), "a launch of ", blocks, " blocks is too large");
    emulated::Machine::get().run(static_cast<unsigned>(blocks), threads,
                                 [&] { kernel(static_cast<Parameters>(arguments)...); });
  }
};

}  // namespace detcore

// What g++'s -fsanitize=alignment,bounds calls: an access that would be an error or worse on a GPU.
namespace emulated {

struct SourceLocation {
  const char* file;
  uint32_t line, column;
};

inline void fault(const SourceLocation* at, const char* what) {
  const std::string message = std::string(at->file) + ":" + std::to_string(at->line) + ": " + what;
  Machine& machine = Machine::get();
  if (machine.in_kernel()) machine.fail(message);
  STD_TORCH_CHECK(false, message);
}

}  // namespace emulated

extern "C" {
__attribute__((weak)) void __ubsan_handle_type_mismatch_v1(const emulated::SourceLocation* at, void*) {
  emulated::fault(at, "access to a misaligned address, or to none");
}
__attribute__((weak)) void __ubsan_handle_out_of_bounds(const emulated::SourceLocation* at, void*) {
  emulated::fault(at, "index outside of the array");
}
}
