// FlashAttention-2 (Dao 2023, arXiv:2307.08691) for a CPU, as two calls of XLA's foreign function
// interface. `native.py` compiles this file, cuts arrays into blocks and has the derivation's names.
//
// What XLA's own loops cannot do and this does: a tile of scores is small enough for the first-level
// cache from its product to its last use, and threads meet once a call, not once an operation. Tiles lie
// transposed, keys by queries, so that what softmax needs of a row (a query) is done lane by lane.
// No sum depends on the number of threads or on their order. All is float32; scores are in base 2.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

// A matrix product holds ROWS x COLUMNS vectors of the result in registers.
#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 4, COLUMNS = 4;
#elif defined(__AVX__)
constexpr int LANES = 8, ROWS = 4, COLUMNS = 2;
#elif defined(__ARM_NEON)
constexpr int LANES = 4, ROWS = 4, COLUMNS = 4;
#else
constexpr int LANES = 4, ROWS = 4, COLUMNS = 2;
#endif

constexpr int BLOCK = 64;        // most queries and most keys of a tile
constexpr float MASKED = -1e30f;  // as in online.py
enum { EMPTY, PARTIAL, FULL };    // as in tiles.py

typedef float Vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

inline Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
inline void store(float* p, Vec x) { *reinterpret_cast<Vec*>(p) = x; }

// 2^x for x <= 127, to the last bit or two; 0 below the normal numbers. 2^x = 2^n 2^f with n whole and
// |f| <= 1/2: the polynomial of Cephes' exp2f for 2^f, and 2^n from the bits of an exponent. Nan stays nan.
inline Vec power_of_2(Vec x) {
  const float round = 12582912.f;  // 1.5 * 2^23: what is added to it is rounded to a whole number
  Vec n = x + round;
  Vec f = x - (n - round);
  Vec p = 1.535336188319500e-4f * f + 1.339887440266574e-3f;
  p = p * f + 9.618437357674640e-3f;
  p = p * f + 5.550332471162809e-2f;
  p = p * f + 2.402264791363012e-1f;
  p = p * f + 6.931472028550421e-1f;
  p = p * f + 1.f;
  Bits power = (reinterpret_cast<Bits>(n) << 23) + 0x3f800000u;
  return x < -126.f ? Vec{} : p * reinterpret_cast<Vec>(power);
}

// ROWS rows and V vectors of columns of c [., N] (+)= a b [K, N], where a[m, k] is a[m * am + k * ak].
template <bool ADD, int V>
inline void product(const float* a, long am, long ak, const float* b, float* c, long N, long K) {
  Vec sums[ROWS][V];
  for (int m = 0; m < ROWS; m++)
    for (int v = 0; v < V; v++) sums[m][v] = ADD ? load(c + m * N + v * LANES) : Vec{};
  for (long k = 0; k < K; k++) {
    Vec row[V];
    for (int v = 0; v < V; v++) row[v] = load(b + k * N + v * LANES);
#pragma GCC unroll 4
    for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) sums[m][v] += a[m * am + k * ak] * row[v];
  }
  for (int m = 0; m < ROWS; m++)
    for (int v = 0; v < V; v++) store(c + m * N + v * LANES, sums[m][v]);
}

// c [M, N] = a b, or c += a b. M is a multiple of ROWS, N of LANES.
template <bool ADD>
void matmul(const float* a, long am, long ak, const float* b, float* c, long M, long N, long K) {
  long n = 0;
  for (; n + COLUMNS * LANES <= N; n += COLUMNS * LANES)
    for (long m = 0; m < M; m += ROWS)
      product<ADD, COLUMNS>(a + m * am, am, ak, b + n, c + m * N + n, N, K);
  for (; n < N; n += LANES)
    for (long m = 0; m < M; m += ROWS)
      product<ADD, 1>(a + m * am, am, ak, b + n, c + m * N + n, N, K);
}

// work(i) for every i below `items`, by the pool's threads and this one, which returns when all are done.
template <typename Work>
void parallel(ffi::ThreadPool& pool, long items, Work work) {
  struct Progress {
    std::atomic<long> next{0}, done{0};
    std::mutex mutex;
    std::condition_variable all;
  };
  auto progress = std::make_shared<Progress>();
  auto share = [progress, items, work] {
    long mine = 0;
    for (long i; (i = progress->next++) < items; mine++) work(i);
    if (mine && (progress->done += mine) == items) {
      std::lock_guard<std::mutex> lock(progress->mutex);
      progress->all.notify_all();
    }
  };
  long others = std::min<long>(pool.num_threads(), items) - 1;
  for (long i = 0; i < others; i++) pool.Schedule(decltype(share)(share));
  share();
  std::unique_lock<std::mutex> lock(progress->mutex);
  progress->all.wait(lock, [&] { return progress->done == items; });
}

using F32 = ffi::Buffer<ffi::F32>;
using S32 = ffi::Buffer<ffi::S32>;

// Sizes of a call: N query heads, each with K's head n / G; counts and lengths of blocks; all of H.
struct Sizes {
  long N, G, H, query_blocks, queries, key_blocks, keys;

  Sizes(const F32& queries_t, const F32& k)
      : N(queries_t.dimensions()[0]), G(N / k.dimensions()[0]), H(k.dimensions()[3]),
        query_blocks(queries_t.dimensions()[1]), queries(queries_t.dimensions()[3]),
        key_blocks(k.dimensions()[1]), keys(k.dimensions()[2]) {}

  bool fit() const {
    return queries <= BLOCK && keys <= BLOCK && queries % LANES == 0 && queries % ROWS == 0 &&
           keys % ROWS == 0 && H % LANES == 0;
  }
  long query_at(long n, long i) const { return (n * query_blocks + i) * queries; }
  long key_at(long n, long j) const { return (n * key_blocks + j) * keys; }
};

ffi::Error unfit() {
  return ffi::Error::InvalidArgument(
      "native attention: blocks must be at most 64 long, they and H whole vectors (native.py's MULTIPLE)");
}

// Which tiles to visit, and which pairs inside a PARTIAL one are seen: mask.py's structure.
struct Masking {
  const int32_t *states, *prefix, *query_segments, *key_segments;
  long rows, row_states;
  int offset, low, high;
  Sizes sizes;

  Masking(const S32& states, const S32& offset, const S32& prefix, const S32& query_segments,
          const S32& key_segments, int64_t low, int64_t high, Sizes sizes)
      : states(states.typed_data()), prefix(prefix.typed_data()),
        query_segments(query_segments.typed_data()), key_segments(key_segments.typed_data()),
        rows(prefix.element_count()), row_states(states.dimensions()[0]),
        offset(offset.typed_data()[0]), low(int(low)), high(int(high)), sizes(sizes) {}

  long row(long n) const { return n / (sizes.N / rows); }

  int state(long n, long i, long j) const {
    long b = row_states == 1 ? 0 : row(n);
    return states[(b * sizes.query_blocks + i) * sizes.key_blocks + j];
  }

  void hide(float* scores, long n, long i, long j) const {
    long b = row(n);
    const int32_t* of_query = query_segments + sizes.query_at(b, i);
    const int32_t* of_key = key_segments + sizes.key_at(b, j);
    int queries = sizes.queries, keys = sizes.keys;
    for (int y = 0; y < keys; y++, scores += queries) {
      int key = j * keys + y, gap = key - (i * queries + offset), segment = of_key[y];
      bool open = key < prefix[b];
      for (int x = 0; x < queries; x++) {
        bool near = (gap - x >= low) & (gap - x <= high);
        bool seen = (open | near) & (of_query[x] == segment) & (segment != 0);
        scores[x] = seen ? scores[x] : MASKED;
      }
    }
  }
};

// Scores -> exp2(scores - peak) in place, for a tile; what rows keep (online.py's `absorb`).
void absorb(float* scores, float* peak, float* total, float* shrink, Sizes z) {
  for (long x = 0; x < z.queries; x += LANES) {
    Vec before = load(peak + x), top = before, sum{};
    for (long y = 0; y < z.keys; y++) {
      Vec score = load(scores + y * z.queries + x);
      top = score > top ? score : top;
    }
    for (long y = 0; y < z.keys; y++) {
      Vec power = power_of_2(load(scores + y * z.queries + x) - top);
      store(scores + y * z.queries + x, power);
      sum += power;
    }
    Vec less = power_of_2(before - top);
    store(peak + x, top);
    store(shrink + x, less);
    store(total + x, load(total + x) * less + sum);
  }
}

void scale_rows(float* rows, const float* by, Sizes z) {
  for (long x = 0; x < z.queries; x++)
    for (long h = 0; h < z.H; h += LANES) store(rows + x * z.H + h, load(rows + x * z.H + h) * by[x]);
}

// queries_t [N, query blocks, H, queries], k and v [N / G, key blocks, keys, H]
// -> out [N, query blocks, queries, H], log-sum-exp [N, query blocks, queries].
ffi::Error forward(ffi::ThreadPool pool, F32 queries_t, F32 k, F32 v, S32 states, S32 offset,
                   S32 prefix, S32 query_segments, S32 key_segments, int64_t low, int64_t high,
                   ffi::Result<F32> out, ffi::Result<F32> lse) {
  Sizes z(queries_t, k);
  if (!z.fit()) return unfit();
  Masking mask(states, offset, prefix, query_segments, key_segments, low, high, z);
  const float *Q = queries_t.typed_data(), *K = k.typed_data(), *V = v.typed_data();
  float *O = out->typed_data(), *L = lse->typed_data();

  parallel(pool, z.N * z.query_blocks, [=](long item) {
    alignas(64) float scores[BLOCK * BLOCK], peak[BLOCK], total[BLOCK], shrink[BLOCK];
    // The last block of a head first: under a causal mask it sees the most keys.
    long n = item / z.query_blocks, i = z.query_blocks - 1 - item % z.query_blocks;
    float* o = O + z.query_at(n, i) * z.H;
    std::fill(o, o + z.queries * z.H, 0.f);
    std::fill(peak, peak + BLOCK, MASKED);
    std::fill(total, total + BLOCK, 0.f);
    for (long j = 0; j < z.key_blocks; j++) {
      int state = mask.state(n, i, j);
      if (state == EMPTY) continue;
      long at = z.key_at(n / z.G, j) * z.H;
      matmul<false>(K + at, z.H, 1, Q + z.query_at(n, i) * z.H, scores, z.keys, z.queries, z.H);
      if (state == PARTIAL) mask.hide(scores, n, i, j);
      absorb(scores, peak, total, shrink, z);
      scale_rows(o, shrink, z);
      matmul<true>(scores, 1, z.queries, V + at, o, z.queries, z.H, z.keys);
    }
    for (long x = 0; x < z.queries; x++) {
      bool sees = peak[x] > MASKED / 2;
      shrink[x] = sees ? 1 / total[x] : 0;
      L[z.query_at(n, i) + x] = sees ? peak[x] + std::log2(total[x]) : -MASKED;
    }
    scale_rows(o, shrink, z);
  });
  return ffi::Error::Success();
}

// Scores and dO·v of a tile -> probabilities and gradients in the scores (online.py's `tile_grads`).
void tile_grads(float* scores, float* grads, const float* lse, const float* delta, Sizes z) {
  for (long x = 0; x < z.queries; x += LANES) {
    Vec sum = load(lse + x), less = load(delta + x);
    for (long at = x; at < z.keys * z.queries; at += z.queries) {
      Vec weights = power_of_2(load(scores + at) - sum);
      store(scores + at, weights);
      store(grads + at, weights * (load(grads + at) - less));
    }
  }
}

// As above; `queries` and out_grads lie as `out`, those with _t as queries_t, delta as the log-sum-exp.
// -> dq of every part [parts, N, query blocks, queries, H], dk and dv [N, key blocks, keys, H] of every query
// head, to be summed. A part has every parts-th block of keys: with few heads there is work for more threads.
ffi::Error backward(ffi::ThreadPool pool, F32 queries, F32 queries_t, F32 k, F32 v, F32 out_grads,
                    F32 out_grads_t, F32 lse, F32 delta, S32 states, S32 offset, S32 prefix,
                    S32 query_segments, S32 key_segments, int64_t low, int64_t high,
                    ffi::Result<F32> q_grads, ffi::Result<F32> k_grads, ffi::Result<F32> v_grads) {
  Sizes z(queries_t, k);
  if (!z.fit()) return unfit();
  Masking mask(states, offset, prefix, query_segments, key_segments, low, high, z);
  const float *Q = queries.typed_data(), *Qt = queries_t.typed_data();
  const float *G = out_grads.typed_data(), *Gt = out_grads_t.typed_data();
  const float *K = k.typed_data(), *V = v.typed_data();
  const float *L = lse.typed_data(), *D = delta.typed_data();
  float *dQ = q_grads->typed_data(), *dK = k_grads->typed_data(), *dV = v_grads->typed_data();
  long parts = q_grads->dimensions()[0];

  parallel(pool, parts * z.N, [=](long item) {
    alignas(64) float scores[BLOCK * BLOCK], grads[BLOCK * BLOCK];
    long n = item % z.N;
    float* dq = dQ + z.query_at(item, 0) * z.H;
    std::fill(dq, dq + z.query_blocks * z.queries * z.H, 0.f);
    for (long j = item / z.N; j < z.key_blocks; j += parts) {
      const float *kj = K + z.key_at(n / z.G, j) * z.H, *vj = V + z.key_at(n / z.G, j) * z.H;
      float *dk = dK + z.key_at(n, j) * z.H, *dv = dV + z.key_at(n, j) * z.H;
      std::fill(dk, dk + z.keys * z.H, 0.f);
      std::fill(dv, dv + z.keys * z.H, 0.f);
      for (long i = 0; i < z.query_blocks; i++) {
        int state = mask.state(n, i, j);
        if (state == EMPTY) continue;
        long row = z.query_at(n, i), at = row * z.H;
        matmul<false>(kj, z.H, 1, Qt + at, scores, z.keys, z.queries, z.H);
        matmul<false>(vj, z.H, 1, Gt + at, grads, z.keys, z.queries, z.H);
        if (state == PARTIAL) mask.hide(scores, n, i, j);
        tile_grads(scores, grads, L + row, D + row, z);
        matmul<true>(scores, z.queries, 1, G + at, dv, z.keys, z.H, z.queries);
        matmul<true>(grads, z.queries, 1, Q + at, dk, z.keys, z.H, z.queries);
        matmul<true>(grads, 1, z.queries, kj, dq + i * z.queries * z.H, z.queries, z.H, z.keys);
      }
    }
  });
  return ffi::Error::Success();
}

}  // namespace

#define MASK                                                          \
  Arg<S32>().Arg<S32>().Arg<S32>().Arg<S32>().Arg<S32>().Attr<int64_t>("low").Attr<int64_t>("high")
#define ARGS_3 Arg<F32>().Arg<F32>().Arg<F32>()

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    native_forward, forward,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().ARGS_3.MASK.Ret<F32>().Ret<F32>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    native_backward, backward,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().ARGS_3.ARGS_3.Arg<F32>().Arg<F32>().MASK.Ret<F32>()
        .Ret<F32>().Ret<F32>());
