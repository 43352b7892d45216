// Frequency-split attention on the GPU: launches the compiled kernels through the driver.
//
// The driver is opened at run time, so the library loads on machines without one. Nothing here
// waits for the device: every launch goes to onnxruntime's stream.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>

namespace freqopt {

struct Extents {
  int64_t batch, heads, kv_heads, length, dim, tokens, text_before;
};

struct Attributes {
  float scale, density;
  int64_t probes;
};

// How many of a head's (query tile, key block) pairs a density makes exact. An attribute is a float:
// 0.1 of 1000 pairs is 100 of them, though 0.1f is more than 0.1.
inline int64_t exact_pairs(float density, int64_t pairs) {
  const double share = double(density) * pairs;
  return std::min(std::max<int64_t>(int64_t(std::ceil(share - share * 1e-7)), 1), pairs);
}

struct Cubin {  // one row of the generated table
  // arguments: names, comma-separated, in launch order. A tensor map is five of them: x.map, then
  // its extents and strides in elements, which Triton passes once more.
  const char *kernel, *symbol, *arguments;
  int capability, dtype, head_dim, masked;
  int tile, warps, shared;
  const unsigned char* image;
};
extern const Cubin kCubins[];
extern const int kCubinCount;

struct CudaCall {
  Extents extents;
  Attributes attributes;
  int type;  // 0 float, 1 half, 2 bfloat16
  int64_t mask_batch, mask_length;
  void *query, *key, *value, *budget, *key_mask, *order, *out, *stream;
};

struct CudaPlan {  // where each intermediate tensor lies in the workspace
  std::map<std::string, size_t> offset;
  size_t workspace_bytes;
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
