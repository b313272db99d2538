/* Threads: those that the caller lends (onnxruntime's), else torch's OpenMP runtime where it was
 * handed over, else a small pool of our own.
 *
 * Two OpenMP runtimes (or a pool beside one) oversubscribe the cores, because an OpenMP worker
 * spins for a while after its last region. So native.py passes the address of GOMP_parallel in the
 * runtime that torch has loaded (GNU's and Intel's both export it) and our tasks run on torch's
 * threads. Without it a pool of std::thread serves; see docs/decisions/0003-native-library.md. */
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#if !defined(_WIN32)
#include <unistd.h>
#endif

#include "common.h"

namespace {

struct Work {
  nmf_task run;
  void *context;
  int64_t tasks;
  std::atomic<int64_t> next;
};

void drain(void *data) {
  Work *work = static_cast<Work *>(data);
  for (;;) {
    const int64_t task = work->next.fetch_add(1, std::memory_order_relaxed);
    if (task >= work->tasks) return;
    work->run(work->context, task);
  }
}

typedef void (*Runner)(void (*)(void *), void *, unsigned, unsigned);
std::atomic<Runner> g_runner{nullptr};
thread_local const nmf_pool *t_borrowed = nullptr;

void one_task(void *data, size_t task) {
  const Work *work = static_cast<const Work *>(data);
  work->run(work->context, static_cast<int64_t>(task));
}

int64_t process_id() {
#if defined(_WIN32)
  return 0;
#else
  return static_cast<int64_t>(getpid());
#endif
}

class Pool {
 public:
  explicit Pool(int64_t owner) : owner_(owner) {}
  int64_t owner() const { return owner_; }

  /* One region at a time; a second caller gets false and does its work alone. */
  bool run(Work *work, int helpers) {
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (!turn.owns_lock()) return false;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      try {
        while (static_cast<int>(threads_.size()) < helpers) threads_.emplace_back(&Pool::loop, this);
      } catch (...) {
        /* The system gives no more threads: those there are do the work. */
      }
      work_ = work;
      wanted_ = helpers < static_cast<int>(threads_.size()) ? helpers
                                                            : static_cast<int>(threads_.size());
      busy_ = wanted_;
    }
    wake_.notify_all();
    drain(work);
    std::unique_lock<std::mutex> lock(mutex_);
    idle_.wait(lock, [this] { return busy_ == 0; });
    work_ = nullptr;
    return true;
  }

 private:
  void loop() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return wanted_ > 0; });
      --wanted_;
      Work *work = work_;
      lock.unlock();
      drain(work);
      lock.lock();
      if (--busy_ == 0) idle_.notify_one();
    }
  }

  const int64_t owner_;
  std::mutex turn_, mutex_;
  std::condition_variable wake_, idle_;
  std::vector<std::thread> threads_;
  Work *work_ = nullptr;
  int wanted_ = 0, busy_ = 0;
};

/* The pool is never destroyed (threads may be waiting at exit), and a forked child, which has
 * none of its parent's threads, gets a new one. */
std::mutex g_pool_mutex;
Pool *g_pool = nullptr;

Pool *pool() {
  std::lock_guard<std::mutex> lock(g_pool_mutex);
  const int64_t me = process_id();
  if (g_pool == nullptr || g_pool->owner() != me) g_pool = new (std::nothrow) Pool(me);
  return g_pool;
}

}  // namespace

void nmf_parallel(int64_t tasks, int threads, nmf_task run, void *context) {
  if (tasks <= 0) return;
  Work work;
  work.run = run;
  work.context = context;
  work.tasks = tasks;
  work.next.store(0, std::memory_order_relaxed);
  if (threads > tasks) threads = static_cast<int>(tasks);
  if (threads > 256) threads = 256;
  if (threads > 1 && t_borrowed != nullptr) {
    const nmf_pool *borrowed = t_borrowed;
    if (borrowed->run(borrowed->pool, one_task, static_cast<size_t>(tasks), &work)) return;
  } else if (threads > 1) {
    const Runner runner = g_runner.load(std::memory_order_acquire);
    if (runner != nullptr) {
      runner(drain, &work, static_cast<unsigned>(threads), 0);
      return;
    }
    Pool *shared = pool();
    if (shared != nullptr && shared->run(&work, threads - 1)) return;
  }
  drain(&work);
}

void nmf_borrow(const nmf_pool *pool) { t_borrowed = pool; }

void nmflow_set_runner(Runner gomp_parallel) {
  g_runner.store(gomp_parallel, std::memory_order_release);
}
