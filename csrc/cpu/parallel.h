// A loop over independent tasks on several threads.
#pragma once

#include <cstdint>

namespace elle_fast {

// Calls task(context, i) for each i in [0, tasks), on up to `threads` threads, the caller's among them, and returns
// when all are done. Which thread takes which task is not fixed: a task's result must not depend on it.
void run_tasks(int64_t tasks, int threads, void (*task)(void* context, int64_t i), void* context);

// To be called once: children of later forks then do without OpenMP's threads, which they lack. And in a child that was
// there before.
void prepare_for_fork();
void forked();

template <class Body>
inline void parallel_for(int64_t tasks, int threads, const Body& body) {
  const auto task = [](void* context, int64_t i) { (*static_cast<const Body*>(context))(i); };
  run_tasks(tasks, threads, task, const_cast<Body*>(&body));
}

// body(begin, end) for the ranges of `total` things, `each` at a time.
template <class Body>
inline void parallel_ranges(int64_t total, int64_t each, int threads, const Body& body) {
  parallel_for((total + each - 1) / each, threads, [&](int64_t task) {
    const int64_t begin = task * each, end = begin + each;
    body(begin, end < total ? end : total);
  });
}

}  // namespace elle_fast
