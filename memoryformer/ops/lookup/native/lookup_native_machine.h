// What the native lookup asks of the machine: its settings, caches, memory and threads.

#pragma once

#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <tuple>
#include <utility>
#include <vector>

namespace memoryformer {

// --- Settings: set from Python, read at each call. -----------------------------------

inline std::atomic<int> max_threads{0};      // 0: the cores this process may run on
inline std::atomic<int> instruction_set{2};  // at most: 0 portable, 1 AVX2, 2 AVX-512
inline std::atomic<int64_t> packing_reuse{4};  // tokens per bucket that pay for packing

inline int AvailableThreads() {
  const int wanted = max_threads.load();
  if (wanted > 0) return wanted;
  cpu_set_t cores;
  if (sched_getaffinity(0, sizeof(cores), &cores) == 0) return CPU_COUNT(&cores);
  return std::max(1L, sysconf(_SC_NPROCESSORS_ONLN));
}

inline int InstructionSet() {
  int best = 0;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best = 1;
  if (best == 1 && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    best = 2;
#endif
  return std::min(best, instruction_set.load());
}

inline int64_t Level2CacheBytes() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const int64_t found = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (found > 0) return found;
#endif
  return 256 << 10;
}

// --- Memory. -------------------------------------------------------------------------

constexpr size_t kHugePage = 2 << 20;

// Asks for huge pages where a large buffer is about to be touched for the first time.
inline void AdviseHugePages(void* data, size_t bytes) {
  const auto begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) & -kHugePage;
  const auto end = (reinterpret_cast<uintptr_t>(data) + bytes) & -kHugePage;
  if (end >= begin + 2 * kHugePage)
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

// Working memory, kept between calls: fresh pages cost more than the work done on them.
class Scratch {
 public:
  explicit Scratch(size_t bytes) {
    bytes = (std::max<size_t>(bytes, 1) + kUnit - 1) / kUnit * kUnit;
    if (TakeKept(bytes)) return;
    const size_t alignment = bytes >= kHugePage ? kHugePage : kUnit;
    size_ = (bytes + alignment - 1) / alignment * alignment;
    data_ = std::aligned_alloc(alignment, size_);
    if (data_ == nullptr) throw std::bad_alloc();
    AdviseHugePages(data_, size_);
  }
  ~Scratch() {
    std::unique_lock<std::mutex> lock(Mutex());
    if (kept_bytes_ + size_ <= kMaxKept) {
      Kept().emplace_back(size_, data_);
      kept_bytes_ += size_;
      return;
    }
    lock.unlock();
    std::free(data_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <class T>
  T* As() const {
    return static_cast<T*>(data_);
  }

 private:
  static constexpr size_t kUnit = 64 << 10;
  static constexpr size_t kMaxKept = 64 << 20;
  using List = std::vector<std::pair<size_t, void*>>;
  static std::mutex& Mutex() {
    static auto* mutex = new std::mutex;  // outlives threads that end after main
    return *mutex;
  }
  static List& Kept() {
    static auto* kept = new List;
    return *kept;
  }

  bool TakeKept(size_t bytes) {
    std::lock_guard<std::mutex> lock(Mutex());
    List& kept = Kept();
    for (size_t i = kept.size(); i-- > 0;) {
      if (kept[i].first < bytes || kept[i].first > 2 * bytes) continue;
      std::tie(size_, data_) = kept[i];
      kept_bytes_ -= size_;
      kept.erase(kept.begin() + i);
      return true;
    }
    return false;
  }

  static inline size_t kept_bytes_ = 0;
  size_t size_ = 0;
  void* data_ = nullptr;
};

// --- Threads. ------------------------------------------------------------------------

// Runs body(0) .. body(count - 1) on the caller and on helpers from `pool`. The caller
// takes items too and waits only for items that have begun, so a pool that is busy, or
// whose threads all wait here for others, delays nobody.
template <class Pool, class Body>
void ParallelFor(Pool& pool, int num_threads, int64_t count, const Body& body) {
  struct State {
    std::atomic<int64_t> next{0}, unfinished;
    std::mutex mutex;
    std::condition_variable finished;
    std::exception_ptr error;
  };
  if (count <= 0) return;
  auto state = std::make_shared<State>();
  state->unfinished = count;
  // `body` lives until every item is finished; a helper that finds none never reads it.
  auto work = [state, count, body = &body] {
    for (int64_t i; (i = state->next.fetch_add(1)) < count;) {
      try {
        (*body)(i);
      } catch (...) {
        std::lock_guard<std::mutex> lock(state->mutex);
        state->error = std::current_exception();
      }
      if (state->unfinished.fetch_sub(1) == 1) {
        std::lock_guard<std::mutex> lock(state->mutex);
        state->finished.notify_all();
      }
    }
  };
  const int64_t helpers = std::min<int64_t>(num_threads, count) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule(decltype(work)(work));
  work();
  for (int spin = 0; spin < 2000 && state->unfinished.load() != 0; ++spin)
    std::atomic_signal_fence(std::memory_order_seq_cst);
  std::unique_lock<std::mutex> lock(state->mutex);
  state->finished.wait(lock, [&] { return state->unfinished.load() == 0; });
  if (state->error) std::rethrow_exception(state->error);
}

}  // namespace memoryformer
