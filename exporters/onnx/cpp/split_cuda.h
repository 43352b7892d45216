// Frequency-split attention on the GPU: launches the compiled kernels through the driver.
//
// The driver is opened at run time, so the library loads on machines without one.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "launches.h"

namespace freqopt {

struct Extents {  // of the keys, and of queries that may be other tokens
  int64_t batch, heads, kv_heads, length, dim, tokens, text_before;
  int64_t query_length, queries, query_before;
};

struct Attributes {
  float scale, density;
  int64_t probes;
  bool own;  // the queries are the keys' tokens
};

// How many of a head's (query tile, key block) pairs a density makes exact. An attribute is a float:
// 0.1 of 1000 pairs is 100 of them, though 0.1f is more than 0.1.
inline int64_t exact_pairs(float density, int64_t pairs) {
  const double share = double(density) * pairs;
  return std::min(std::max<int64_t>(int64_t(std::ceil(share - share * 1e-7)), 1), pairs);
}

struct CudaCall {
  Extents extents;
  Attributes attributes;
  int type;  // 0 float, 1 half, 2 bfloat16
  int64_t mask_batch, mask_length;
  // Orders (T,) of all heads or, where there are more rows, one for each (batch item, head).
  int64_t order_rows, query_order_rows;
  void *query, *key, *value, *budget, *key_mask, *order, *query_order, *out, *stream;
};

// Both throw std::runtime_error with a message for the user.
CudaPlan plan_cuda(const CudaCall& call);
void launch_cuda(const CudaCall& call, const CudaPlan& plan, void* workspace);

struct AttendCounts {  // launches of the fused attention in this process, by kernel
  // unmapped: those of `portable` that `hopper` would have served if the driver made tensor maps.
  int64_t hopper, portable, unmapped;
};
AttendCounts attend_counts();

}  // namespace freqopt
