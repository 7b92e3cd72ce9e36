// Torch's own OpenMP threads, if torch has them: a second pool would spin beside the first and take its cores. The
// runtime is found among what the process has loaded, not linked, so the extension depends on no particular one.
#include "parallel.h"

#include <atomic>
#include <thread>
#include <vector>

#if !defined(_WIN32)
#include <dlfcn.h>
#include <pthread.h>
#endif

namespace elle_fast {
namespace {

struct Job {
  int64_t tasks;
  void (*task)(void*, int64_t);
  void* context;
  std::atomic<int64_t> next{0};
};

void work(void* pointer) {
  Job& job = *static_cast<Job*>(pointer);
  for (int64_t i; (i = job.next.fetch_add(1, std::memory_order_relaxed)) < job.tasks;) job.task(job.context, i);
}

// The entry that GCC's and LLVM's runtimes share: runs a function on a team of threads, the caller's among them.
using Parallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

std::atomic<bool> in_child{false};

Parallel openmp() {
#if defined(_WIN32) || defined(__SANITIZE_THREAD__)  // the sanitizer does not see how OpenMP's threads wait
  return nullptr;
#else
  static const Parallel found = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return in_child.load(std::memory_order_relaxed) ? nullptr : found;
#endif
}

}  // namespace

void prepare_for_fork() {
#if !defined(_WIN32)
  // A child of fork has the data of OpenMP's threads but not the threads; it would wait for them for ever.
  pthread_atfork(nullptr, nullptr, forked);
#endif
}

void forked() { in_child.store(true, std::memory_order_relaxed); }

void run_tasks(int64_t tasks, int threads, void (*task)(void*, int64_t), void* context) {
  if (threads > tasks) threads = static_cast<int>(tasks);
  if (threads <= 1) {
    for (int64_t i = 0; i < tasks; ++i) task(context, i);
    return;
  }
  Job job{tasks, task, context};
  if (const Parallel parallel = openmp()) {
    parallel(work, &job, static_cast<unsigned>(threads), 0);
    return;
  }
  std::vector<std::thread> others;
  try {
    others.reserve(threads - 1);
    while (static_cast<int>(others.size()) < threads - 1) others.emplace_back(work, &job);
  } catch (...) {
    // No more threads, or no memory for them: those there are share the work.
  }
  work(&job);
  for (std::thread& other : others) other.join();
}

}  // namespace elle_fast
