// The least that pack_points can take: the same bytes, read from two arrays and written to four by the same threads.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
typedef __m512i Vector;
#define STREAM _mm512_stream_si512
#elif defined(__AVX__)
typedef __m256i Vector;
#define STREAM _mm256_stream_si256
#elif defined(__SSE2__)
typedef __m128i Vector;
#define STREAM _mm_stream_si128
#else
typedef uint64_t Vector;
#define STREAM(to, vector) (*(to) = (vector))
#endif

enum { kChunk = 1 << 17, kMostThreads = 256 };  // a chunk of each array is what a thread takes at a time

struct Job {
  const char *x, *given;
  char* points;  // four arrays, one behind the other
  int64_t size;  // bytes of an array
  int streamed;  // stored past the cache
  atomic_llong next;
};

static void chunk(const struct Job* job, int64_t begin, int64_t count) {
  const Vector* x = (const Vector*)(job->x + begin);
  const Vector* given = (const Vector*)(job->given + begin);
  Vector* to[4];
  for (int k = 0; k < 4; ++k) to[k] = (Vector*)(job->points + k * job->size + begin);
  const int64_t vectors = count / (int64_t)sizeof(Vector);
  // Two arrays get x and two the gradient, so that no compiler can leave out a read.
  if (job->streamed) {
    for (int64_t i = 0; i < vectors; ++i) {
      const Vector a = x[i], b = given[i];
      STREAM(to[0] + i, a);
      STREAM(to[1] + i, b);
      STREAM(to[2] + i, a);
      STREAM(to[3] + i, b);
    }
  } else {
    for (int64_t i = 0; i < vectors; ++i) {
      const Vector a = x[i], b = given[i];
      to[0][i] = a;
      to[1][i] = b;
      to[2][i] = a;
      to[3][i] = b;
    }
  }
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

static void work(void* pointer) {
  struct Job* job = pointer;
  for (int64_t at; (at = atomic_fetch_add(&job->next, kChunk)) < job->size;)
    chunk(job, at, job->size - at < kChunk ? job->size - at : kChunk);
}

static void* work_for_pthread(void* job) {
  work(job);
  return NULL;
}

// ``size`` is a multiple of 64, and all addresses are. Returns whether there were enough threads.
int floor_of_pack_points(const char* x, const char* given, char* points, int64_t size, int streamed, int threads) {
  struct Job job = {x, given, points, size, streamed, 0};
  // OpenMP's threads are those of torch, which run already.
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned);
  void* found = dlsym(RTLD_DEFAULT, "GOMP_parallel");
  memcpy(&parallel, &found, sizeof found);
  if (threads > 1 && parallel) {
    parallel(work, &job, (unsigned)threads, 0);
    return 1;
  }
  pthread_t others[kMostThreads];
  const int wanted = threads - 1 < kMostThreads ? threads - 1 : kMostThreads;
  int started = 0;
  while (started < wanted && !pthread_create(&others[started], NULL, work_for_pthread, &job)) ++started;
  work(&job);
  for (int i = 0; i < started; ++i) pthread_join(others[i], NULL);
  return started == threads - 1;
}
