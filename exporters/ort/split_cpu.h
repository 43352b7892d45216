// Frequency-split attention on the CPU, in float32: the definition of kernels/reference.py, one
// (batch, head) at a time. Correct first; it exists so that a file runs the same split with the
// library on a machine without a GPU.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>

namespace freqopt {

struct Extents {
  int64_t batch, heads, kv_heads, length, dim, tokens, text_before;
};

struct Attributes {
  float scale, density;
  bool mid_band;
  int64_t probes;
};

// How many of a head's (query tile, key block) pairs a density makes exact. An attribute is a float:
// 0.1 of 1000 pairs is 100 of them, though 0.1f is more than 0.1.
inline int64_t exact_pairs(float density, int64_t pairs) {
  const double share = double(density) * pairs;
  return std::min(std::max<int64_t>(int64_t(std::ceil(share - share * 1e-7)), 1), pairs);
}

// One head's tensors in the model's order, float32, rows of `dim`.
struct HeadInputs {
  const float *query, *key, *value;
  float exact_from, mid_from;
  const bool* key_mask;  // `length` entries, or nullptr
  const int64_t* order;  // raster index of each video token in token order
};

// out: (length, dim) float32.
void split_head(const Extents& extents, const Attributes& attributes, const HeadInputs& inputs,
                float* out);

}  // namespace freqopt
