#include "order_cuda.h"

#include <algorithm>
#include <string>
#include <utility>

#include "launch_table.h"

namespace freqopt {
namespace {

Launcher launcher_of(const OrderCall& call) {
  return {current_device(), call.type, call.dim, kEither, call.stream};
}

// Tokens of the segments that the tree begins with.
int64_t first_segment(const OrderCall& call) {
  int64_t enclosing = kLeaf;
  while (enclosing < call.tokens) enclosing *= 2;
  return std::max(std::min(enclosing, call.largest_chunk), kLeaf);
}

int64_t channels(const OrderCall& call) { return std::max(padded_dim(call.dim), kRank); }

}  // namespace

CudaPlan plan_order(const OrderCall& call) {
  choose(launcher_of(call), "leaf");  // say early that nothing fits
  const int64_t pairs = call.batch * call.heads, d = call.dim, padded = channels(call);
  const int64_t own = call.type == 0 ? 4 : 2, places = pairs * call.tokens;
  CudaPlan plan;
  plan.add("partial", pairs * kMomentParts * (d * d + d), 4);
  plan.add("covariance", pairs * padded * padded, 4), plan.add("axes", pairs * padded * kRank, 4);
  plan.add("directions", pairs * padded * kRank, own), plan.add("shift", pairs * kRank, 4);
  plan.add("coordinates", places * kRank, 2);
  plan.add("position", places, 4), plan.add("ranks", places, 4);
  if (first_segment(call) > kLargestHalved) {
    plan.add("target", places, 4);
    plan.add("along", pairs * ceil_div(call.tokens, 2 * kLargestHalved) * kRank, 2);
  }
  return plan;
}

void launch_order(const OrderCall& call, const CudaPlan& plan, void* workspace) {
  const Launcher on = launcher_of(call);
  const int64_t pairs = call.batch * call.heads, tokens = call.tokens;
  const int64_t step = ceil_div(tokens, kSamples), samples = ceil_div(tokens, step);
  Arguments a = tensors_of(plan, workspace);
  a["tokens_of"] = call.tokens_of, a["base"] = call.base, a["chunks"] = call.chunks;
  a["order"] = call.order;
  a["stride_n"] = call.dim, a["stride_h"] = call.length * call.dim;
  a["stride_b"] = call.heads * call.length * call.dim;
  a["heads"] = call.heads, a["share"] = call.heads / call.chunk_heads;
  a["tokens"] = tokens, a["text_before"] = call.text_before;
  a["step"] = step, a["samples"] = samples, a["span"] = ceil_div(samples, kMomentParts);
  a["parts"] = kMomentParts;
  a["pairs"] = pairs;
  auto go = [&](const std::string& kernel, const Arguments& own) { launch(on, kernel, a, own); };
  go("moments", {}), go("directions", {}), go("project", {});
  int64_t size = first_segment(call);
  for (; size > kLargestHalved; size /= 2) {  // more than one program reads a segment
    const Arguments own{{"size", size},
                        {"segments", ceil_div(tokens, size)},
                        {"step", size / kSegmentSamples}};
    go("segment", own), go("rank_tokens", own), go("divide", own);
    std::swap(a["position"], a["target"]);
  }
  for (; size > kLeaf; size /= 2) go("halve_" + std::to_string(size), {});
  go("leaf", {});
}

}  // namespace freqopt
