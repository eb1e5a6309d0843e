// Threads that stay together for many short pieces of work, one after another: what
// `ParallelFor` is for one. A helper wakes up once, and then waits for the next
// piece with its eyes open. Start at `Team::Run`.

#pragma once

#include <sched.h>

#include <stdexcept>

#include "lookup_native_machine.h"

namespace memoryformer {

inline void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Whoever waits gives the core away after so many looks: others may need it.
class Patience {
 public:
  void Wait() {
    if (++looks_ < kLooks) return Pause();
    sched_yield();
  }

 private:
  static constexpr int kLooks = 4000;
  int looks_ = 0;
};

// The caller and helpers from `pool`. The caller takes items too and waits only for
// items that have begun, so helpers that never come delay nobody.
class Team {
 public:
  template <class Pool>
  Team(Pool& pool, int threads) : threads_(std::max(1, threads)) {
    if (threads_ == 1) return;
    state_ = std::make_shared<State>();
    for (int i = 1; i < threads_; ++i)
      pool.Schedule([state = state_] { Help(*state); });
  }
  ~Team() {
    if (state_ != nullptr) state_->over.store(true, std::memory_order_release);
  }
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int threads() const { return threads_; }

  // Runs body(0) .. body(count - 1), which may not throw, and returns when all have ended.
  template <class Body>
  void Run(int64_t count, const Body& body) {
    if (state_ == nullptr || count < 2) {
      for (int64_t i = 0; i < count; ++i) body(i);
      return;
    }
    if (count > kMaxItems) throw std::length_error("too many items for a team");
    State& state = *state_;
    state.body = &body;
    state.call = [](const void* b, int64_t i) { (*static_cast<const Body*>(b))(i); };
    state.finished.store(0, std::memory_order_relaxed);
    const uint64_t phase = (state.ticket.load(std::memory_order_relaxed) >> 40) + 1;
    state.ticket.store(phase << 40 | uint64_t(count) << 20, std::memory_order_release);
    while (TakeItem(state)) {
    }
    Patience patience;
    while (state.finished.load(std::memory_order_acquire) != count) patience.Wait();
  }

 private:
  static constexpr int64_t kMaxItems = (1 << 20) - 1;

  struct State {
    // 24 bits of the piece's number, 20 of its items, 20 of the next item: an item is
    // taken of the piece that was seen, or not at all.
    std::atomic<uint64_t> ticket{0};
    alignas(64) std::atomic<int64_t> finished{0};
    std::atomic<bool> over{false};
    const void* body = nullptr;
    void (*call)(const void*, int64_t) = nullptr;
  };

  static bool TakeItem(State& state) {
    uint64_t ticket = state.ticket.load(std::memory_order_acquire);
    do {
      const uint64_t next = ticket & kMaxItems, count = ticket >> 20 & kMaxItems;
      if (next >= count) return false;
    } while (!state.ticket.compare_exchange_weak(ticket, ticket + 1,
                                                 std::memory_order_acq_rel));
    state.call(state.body, ticket & kMaxItems);
    state.finished.fetch_add(1, std::memory_order_release);
    return true;
  }

  static void Help(State& state) {
    Patience patience;
    while (!state.over.load(std::memory_order_acquire)) {
      if (TakeItem(state))
        patience = Patience();
      else
        patience.Wait();
    }
  }

  const int threads_;
  std::shared_ptr<State> state_;
};

}  // namespace memoryformer
