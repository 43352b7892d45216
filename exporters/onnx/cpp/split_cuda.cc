#include "split_cuda.h"

#include <atomic>
#include <deque>
#include <map>
#include <string>
#include <utility>

#include "launch_table.h"

namespace freqopt {
namespace {

bool masked(const CudaCall& call) { return call.mask_length != 1; }

Launcher launcher_of(const CudaCall& call) {
  return {current_device(), call.type, call.extents.dim, masked(call) ? kMasked : kUnmasked,
          call.stream};
}

// Extents by name: numbers that kernels are given, and others that they are derived from.
Arguments extents_of(const CudaCall& c) {
  const Extents& e = c.extents;
  const int64_t padded = padded_dim(e.dim), probes = std::min(c.attributes.probes, e.queries);
  Arguments a{{"heads", e.heads}, {"kv_heads", e.kv_heads}, {"pairs", e.batch * e.heads},
              {"kv_pairs", e.batch * e.kv_heads}, {"group_size", e.heads / e.kv_heads},
              {"dim", e.dim}, {"padded", padded}, {"cells", e.dim * e.dim},
              {"shares", padded / std::min(kTotalCols, padded)}, {"tokens", e.tokens},
              {"text_before", e.text_before}, {"text", e.length - e.tokens},
              {"queries", e.queries}, {"query_before", e.query_before},
              {"query_text", e.query_length - e.queries}, {"probes", probes}};
  for (const Derived& d : kDerived) a[d.name] = ceil_div(a.at(d.of).number(), d.part);
  const int64_t programs = kProbePrograms / a.at("pairs").number();
  a["parts"] = std::max<int64_t>(std::min({programs, kMaxParts, a.at("blocks").number()}), 1);
  return a;
}

std::atomic<int64_t> g_hopper{0}, g_portable{0}, g_unmapped{0};

// The Hopper kernel, or null where freqopt.kernels.hopper.launch.applies() is false: the table has it for
// the variants that it serves.
const Cubin* find_hopper(const Launcher& on) {
  return on.device.capability == 90 ? find(on, "attend_hopper") : nullptr;
}

int64_t whole_tiles(int64_t rows) { return ceil_div(rows, kQueryTile) * kQueryTile; }

// The text tokens of (kv, N, D) `from`, with zeros up to whole tiles: the kernel weighs the rows
// behind the text with 0, so they must be numbers.
void gather_text(const CudaCall& call, const Launcher& on, const Arguments& a, void* from,
                 const Argument& to) {
  const Extents& e = call.extents;
  const int64_t row = e.dim * 2, text = a.at("text").number();
  const int64_t kv = a.at("kv_pairs").number();
  const int64_t padded = whole_tiles(text);
  if (padded > text) fill(on, to, 0, kv * padded * row / 4);
  const std::pair<int64_t, int64_t> before{0, e.text_before};
  const std::pair<int64_t, int64_t> after{e.text_before + e.tokens, text - e.text_before};
  int64_t at = 0;
  for (const auto& [start, count] : {before, after}) {
    if (count == 0) continue;
    Copy2D copy;
    copy.source = static_cast<const char*>(from) + start * row;
    copy.target = static_cast<char*>(to.pointer()) + at * row;
    copy.source_pitch = size_t(e.length * row), copy.target_pitch = size_t(padded * row);
    copy.width = size_t(count * row), copy.height = size_t(kv);
    Driver::get().check(Driver::get().Memcpy2DAsync(&copy, call.stream), "copying text tokens");
    at += count;
  }
}

void launch_hopper(const CudaCall& call, const Launcher& on, const Arguments& a) {
  const int64_t d = call.extents.dim, kv = a.at("kv_pairs").number();
  const int64_t means = kv * a.at("blocks").number();
  std::deque<TensorMap> maps;  // the driver copies them at launch
  Arguments own;
  auto map = [&](const std::string& name, const char* data, int64_t rows) {
    own[name + ".map"] = &maps.emplace_back(map_rows(a.at(data).pointer(), rows, d, call.type == 2));
    own[name + ".extent0"] = rows, own[name + ".extent1"] = d;
    own[name + ".stride0"] = d, own[name + ".stride1"] = int64_t(1);
  };
  map("key", "key_out", means * kKeyBlock), map("value", "value_out", means * kKeyBlock);
  map("low_key", "low_key", means), map("low_value", "low_value", means);
  map("matrix", "matrix", a.at("pairs").number() * d);
  if (a.at("text").number() > 0) {
    gather_text(call, on, a, call.key, a.at("text_key_rows"));
    gather_text(call, on, a, call.value, a.at("text_value_rows"));
    const int64_t rows = kv * whole_tiles(a.at("text").number());
    map("text_key", "text_key_rows", rows), map("text_value", "text_value_rows", rows);
  } else {  // never read
    for (const char* part : {".map", ".extent0", ".extent1", ".stride0", ".stride1"}) {
      own[std::string("text_key") + part] = own[std::string("key") + part];
      own[std::string("text_value") + part] = own[std::string("value") + part];
    }
  }
  launch(on, "attend_hopper", a, own);
}

// The fused attention, by the fastest kernel that serves the call.
void launch_attend(const CudaCall& call, const Launcher& on, const Arguments& a) {
  const Cubin* hopper = find_hopper(on);
  if (hopper && Driver::get().TensorMapEncodeTiled) {
    launch_hopper(call, on, a);
    ++g_hopper;
    return;
  }
  launch(on, "attend", a, {});
  ++g_portable;
  if (hopper) ++g_unmapped;
}

}  // namespace

AttendCounts attend_counts() { return {g_hopper, g_portable, g_unmapped}; }

CudaPlan plan_cuda(const CudaCall& call) {
  const Arguments a = extents_of(call);
  const int64_t own = call.type == 0 ? 4 : 2;
  if (call.mask_length == 1 && call.mask_batch != 1) {
    throw std::runtime_error("a key_mask of shape (batch, 1) is not supported on the GPU");
  }
  const Launcher on = launcher_of(call);
  choose(on, "attend");  // say early that nothing fits
  CudaPlan plan;
  for (const Buffer& buffer : kBuffers) {
    int64_t elements = call.extents.batch * buffer.times;
    for (int i = 0; buffer.extents[i]; ++i) elements *= a.at(buffer.extents[i]).number();
    plan.add(buffer.name, elements, buffer.bytes ? buffer.bytes : own);
  }
  const int64_t text = a.at("text").number();
  if (text > 0 && find_hopper(on)) {
    const int64_t elements = a.at("kv_pairs").number() * whole_tiles(text) * call.extents.dim;
    plan.add("text_key_rows", elements, own), plan.add("text_value_rows", elements, own);
  }
  return plan;
}

void launch_cuda(const CudaCall& call, const CudaPlan& plan, void* workspace) {
  const Extents& e = call.extents;
  const Launcher on = launcher_of(call);
  Arguments a = extents_of(call);
  a.merge(tensors_of(plan, workspace));
  const int64_t pairs = a.at("pairs").number(), probes = a.at("probes").number();
  const int64_t rows = e.length * e.dim, query_rows = e.query_length * e.dim;
  a["query"] = call.query, a["key"] = call.key, a["value"] = call.value, a["out"] = call.out;
  a["budget"] = call.budget, a["scale"] = call.attributes.scale;
  a["key_mask"] = masked(call) ? Argument(call.key_mask) : a["route"];
  // Whoever reads an order reads the queries'; the keys are put in theirs by the first launch.
  a["order"] = call.query_order, a["order_row"] = call.query_order_rows > 1 ? e.queries : 0;
  a["order_share"] = pairs / call.query_order_rows;
  a["key_order"] = call.order, a["key_order_row"] = call.order_rows > 1 ? e.tokens : 0;
  for (const char* n : {"stride_qn", "stride_kn", "stride_vn", "stride_on"}) a[n] = e.dim;
  for (const char* n : {"stride_kh", "stride_vh"}) a[n] = rows;
  for (const char* n : {"stride_qh", "stride_oh"}) a[n] = query_rows;
  for (const char* n : {"stride_qb", "stride_ob"}) a[n] = e.heads * query_rows;
  for (const char* n : {"stride_kb", "stride_vb"}) a[n] = e.kv_heads * rows;
  a["stride_mb"] = int64_t(masked(call) && call.mask_batch > 1 ? e.length : 0);
  const float density = call.attributes.density;
  a["kept"] = exact_pairs(density, a.at("tiles").number() * a.at("blocks").number());

  if (probes == 0) {
    constexpr unsigned kOne = 0x3f800000;  // 1.0f
    fill(on, a["coefficients"], kOne, pairs * 2);
  }
  const std::map<std::string, bool> applies{{"", true},
                                            {"density", density > 0},
                                            {"threshold", density <= 0},
                                            {"probes", probes > 0},
                                            {"query_text", e.query_length > e.queries}};
  for (const Step& step : kSteps) {
    if (!applies.at(step.when)) continue;
    std::string kernel = step.kernel;
    if (step.of_tokens && !call.attributes.own) kernel += "_other";
    if (kernel == "attend") launch_attend(call, on, a);
    else launch(on, kernel, a, {});
  }
}

}  // namespace freqopt
