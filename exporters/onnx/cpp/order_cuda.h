// The content order on the GPU, as freqopt.kernels.forward.order launches it.
#pragma once
#include <cstdint>

#include "launches.h"

namespace freqopt {

struct OrderCall {
  int64_t batch, heads, length, dim;  // of the tokens (B, H, N, D)
  int64_t tokens, text_before;        // how many are ordered, and where they begin
  int64_t chunk_heads;                // a divisor of heads: chunks (chunk_heads,) int32
  int64_t largest_chunk;              // at least the largest of them
  int type;                           // 0 float, 1 half, 2 bfloat16
  // base (T,) int64; order (B, H, T) int64 is written
  void *tokens_of, *base, *chunks, *order, *stream;
};

// Both throw std::runtime_error with a message for the user.
CudaPlan plan_order(const OrderCall& call);
void launch_order(const OrderCall& call, const CudaPlan& plan, void* workspace);

}  // namespace freqopt
