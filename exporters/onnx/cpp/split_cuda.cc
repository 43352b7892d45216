#include "split_cuda.h"

#include <atomic>
#include <deque>
#include <string>
#include <utility>

namespace freqopt {
namespace {

constexpr int64_t kGroup = 4, kOrderGroup = 32;
constexpr int64_t kProbePrograms = 264, kMaxParts = 64, kMoments = 16, kUnit = 16;
constexpr int64_t kPooledTiles = 4, kSubTiles = 16;

bool masked(const CudaCall& call) { return call.mask_length != 1; }

Launcher launcher_of(const CudaCall& call) {
  return {current_device(), call.type, call.extents.dim, masked(call) ? kMasked : kUnmasked,
          call.stream};
}

struct Sizes {
  explicit Sizes(const CudaCall& c) {
    const Extents& e = c.extents;
    pairs = e.batch * e.heads, kv = e.batch * e.kv_heads;
    blocks = ceil_div(e.tokens, kKeyBlock), tiles = ceil_div(e.queries, kQueryTile);
    groups = ceil_div(blocks, kGroup), spans = ceil_div(blocks, kOrderGroup);
    text = e.length - e.tokens, query_text = e.query_length - e.queries;
    probes = std::min(c.attributes.probes, e.queries);
    parts = std::max<int64_t>(std::min({kProbePrograms / pairs, kMaxParts, blocks}), 1);
  }
  int64_t pairs, kv, blocks, tiles, groups, spans, text, query_text, probes, parts;
};

std::atomic<int64_t> g_hopper{0}, g_portable{0}, g_unmapped{0};

// The Hopper kernel, or null where freqopt.kernels.hopper.launch.applies() is false: the table has it for
// the variants that it serves.
const Cubin* find_hopper(const Launcher& on) {
  return on.device.capability == 90 ? find(on, "attend_hopper") : nullptr;
}

int64_t whole_tiles(int64_t rows) { return ceil_div(rows, kQueryTile) * kQueryTile; }

// The text tokens of (kv, N, D) `from`, with zeros up to whole tiles: the kernel weighs the rows
// behind the text with 0, so they must be numbers.
void gather_text(const CudaCall& call, const Launcher& on, const Sizes& s, void* from,
                 const Argument& to) {
  const Extents& e = call.extents;
  const int64_t row = e.dim * 2, padded = whole_tiles(s.text);
  if (padded > s.text) fill(on, to, 0, s.kv * padded * row / 4);
  const std::pair<int64_t, int64_t> before{0, e.text_before};
  const std::pair<int64_t, int64_t> after{e.text_before + e.tokens, s.text - e.text_before};
  int64_t at = 0;
  for (const auto& [start, count] : {before, after}) {
    if (count == 0) continue;
    Copy2D copy;
    copy.source = static_cast<const char*>(from) + start * row;
    copy.target = static_cast<char*>(to.pointer()) + at * row;
    copy.source_pitch = size_t(e.length * row), copy.target_pitch = size_t(padded * row);
    copy.width = size_t(count * row), copy.height = size_t(s.kv);
    Driver::get().check(Driver::get().Memcpy2DAsync(&copy, call.stream), "copying text tokens");
    at += count;
  }
}

void launch_hopper(const CudaCall& call, const Launcher& on, const Sizes& s, const Cubin& cubin,
                   const Arguments& a) {
  const int64_t d = call.extents.dim, means = s.kv * s.blocks;
  std::deque<TensorMap> maps;  // the driver copies them at launch
  Arguments own;
  auto map = [&](const std::string& name, const char* data, int64_t rows) {
    own[name + ".map"] = &maps.emplace_back(map_rows(a.at(data).pointer(), rows, d, call.type == 2));
    own[name + ".extent0"] = rows, own[name + ".extent1"] = d;
    own[name + ".stride0"] = d, own[name + ".stride1"] = int64_t(1);
  };
  map("key", "key_out", means * kKeyBlock), map("value", "value_out", means * kKeyBlock);
  map("low_key", "low_key", means), map("low_value", "low_value", means);
  map("low_order", "low_order", s.kv * d);
  if (s.text > 0) {
    gather_text(call, on, s, call.key, a.at("text_key_rows"));
    gather_text(call, on, s, call.value, a.at("text_value_rows"));
    const int64_t rows = s.kv * whole_tiles(s.text);
    map("text_key", "text_key_rows", rows), map("text_value", "text_value_rows", rows);
  } else {  // never read
    for (const char* part : {".map", ".extent0", ".extent1", ".stride0", ".stride1"}) {
      own[std::string("text_key") + part] = own[std::string("key") + part];
      own[std::string("text_value") + part] = own[std::string("value") + part];
    }
  }
  launch(on, "attend_hopper", a, own, ceil_div(call.extents.queries, cubin.tile), s.pairs);
}

// The fused attention, by the fastest kernel that serves the call.
void launch_attend(const CudaCall& call, const Launcher& on, const Sizes& s, const Arguments& a) {
  const Cubin* hopper = find_hopper(on);
  if (hopper && Driver::get().TensorMapEncodeTiled) {
    launch_hopper(call, on, s, *hopper, a);
    ++g_hopper;
    return;
  }
  const int64_t rows = choose(on, "attend").tile;
  launch(on, "attend", a, {}, ceil_div(call.extents.queries, rows), s.pairs);
  ++g_portable;
  if (hopper) ++g_unmapped;
}

}  // namespace

AttendCounts attend_counts() { return {g_hopper, g_portable, g_unmapped}; }

CudaPlan plan_cuda(const CudaCall& call) {
  const Sizes s(call);
  const int64_t d = call.extents.dim, own = call.type == 0 ? 4 : 2;
  if (call.mask_length == 1 && call.mask_batch != 1) {
    throw std::runtime_error("a key_mask of shape (batch, 1) is not supported on the GPU");
  }
  const Launcher on = launcher_of(call);
  choose(on, "attend");  // say early that nothing fits
  CudaPlan plan;
  auto add = [&](const char* name, int64_t elements, int64_t bytes) {
    plan.add(name, elements, bytes);
  };
  const int64_t rows = s.kv * s.blocks, cells = s.pairs * s.tiles * s.blocks;
  add("limits", s.pairs, 4);
  add("key_out", rows * kKeyBlock * d, own), add("value_out", rows * kKeyBlock * d, own);
  add("key_mean", rows * d, 4), add("key_var", rows * d, own), add("spread", rows, 4);
  // The head's spread is in parts; there are at most as many as channels.
  add("sums", s.kv * s.groups * 3 * d, 4), add("head_spread", s.kv * d, 4);
  add("first_order", s.kv * s.spans * d * d, 4);
  add("key_shift", s.kv * d, 4), add("low_key", rows * d, own), add("low_value", rows * d, own);
  add("low_order", s.kv * d * d, own);
  const int64_t fours = ceil_div(s.tiles, kPooledTiles) * kPooledTiles;
  add("sub_mean", s.pairs * fours * kSubTiles * d, own);
  add("tile_square", s.pairs * s.tiles * d, own);
  add("score", cells, 4), add("mass_term", cells, 2), add("route", cells, 1);
  add("exact_list", cells, 4), add("counts", s.pairs * s.tiles, 4);
  add("peak", s.pairs * s.parts * s.probes, 4), add("mass", s.pairs * s.parts * s.probes * 2, 4);
  add("exact_out", s.pairs * s.parts * s.probes * d, 4);
  add("missing_out", s.pairs * s.parts * s.probes * d, 4);
  add("coefficients", s.pairs * 2, 4);
  add("logit", s.pairs * s.probes * s.blocks, 4), add("term", s.pairs * s.probes * s.blocks, 2);
  add("moments", s.pairs * ceil_div(s.probes, kUnit) * ceil_div(s.blocks, kUnit) * kMoments, 4);
  add("probe_error", s.pairs, 4);
  if (s.text > 0 && find_hopper(on)) {
    const int64_t text = s.kv * whole_tiles(s.text) * d;
    add("text_key_rows", text, own), add("text_value_rows", text, own);
  }
  return plan;
}

void launch_cuda(const CudaCall& call, const CudaPlan& plan, void* workspace) {
  const Sizes s(call);
  const Extents& e = call.extents;
  const Launcher on = launcher_of(call);
  Arguments a = tensors_of(plan, workspace);
  const int64_t rows = e.length * e.dim, query_rows = e.query_length * e.dim;
  a["query"] = call.query, a["budget"] = call.budget;
  // Whoever reads an order reads the queries'; the keys are put in theirs by the first launch.
  a["order"] = call.query_order, a["order_row"] = call.query_order_rows > 1 ? e.queries : 0;
  a["order_share"] = s.pairs / call.query_order_rows;
  a["queries"] = e.queries, a["query_before"] = e.query_before, a["query_text"] = s.query_text;
  a["key"] = a["key_out"], a["value"] = a["value_out"];
  a["text_key"] = call.key, a["text_value"] = call.value, a["out"] = call.out;
  a["key_mask"] = masked(call) ? Argument(call.key_mask) : a["route"];
  a["threshold"] = a["limits"], a["peak_out"] = a["peak"], a["mass_out"] = a["mass"];
  a["logit_out"] = a["logit"], a["term_out"] = a["term"];
  for (const char* n : {"stride_qn", "stride_kn", "stride_vn", "stride_on"}) a[n] = e.dim;
  for (const char* n : {"stride_kh", "stride_vh"}) a[n] = rows;
  for (const char* n : {"stride_qh", "stride_oh"}) a[n] = query_rows;
  for (const char* n : {"stride_qb", "stride_ob"}) a[n] = e.heads * query_rows;
  for (const char* n : {"stride_kb", "stride_vb"}) a[n] = e.kv_heads * rows;
  a["stride_mb"] = int64_t(masked(call) && call.mask_batch > 1 ? e.length : 0);
  a["heads"] = e.heads, a["group_size"] = e.heads / e.kv_heads, a["tokens"] = e.tokens;
  a["tiles"] = s.tiles, a["blocks"] = s.blocks, a["groups"] = s.groups, a["text"] = s.text;
  a["text_before"] = e.text_before, a["probes"] = s.probes, a["parts"] = s.parts;
  a["cells"] = e.dim * e.dim, a["scale"] = call.attributes.scale;

  auto tile_of = [&](const char* kernel) { return choose(on, kernel).tile; };
  auto go = [&](const std::string& kernel, const Arguments& own, int64_t x, int64_t y,
                int64_t z = 1) { launch(on, kernel, a, own, x, y, z); };
  const std::string other = call.attributes.own ? "" : "_other";  // kernels by whose tokens they are
  const Arguments of_queries{{"tokens", e.queries}, {"text_before", e.query_before}};
  const int64_t key_order_row = call.order_rows > 1 ? e.tokens : 0;
  go("summarise",
     {{"key", call.key}, {"value", call.value}, {"heads", e.kv_heads}, {"order", call.order},
      {"order_row", key_order_row}},
     s.kv, s.groups);
  go("total", {}, ceil_div(padded_dim(e.dim), tile_of("total")), s.kv);
  go("centre", {}, ceil_div(s.blocks, tile_of("centre")), s.kv);
  const int64_t parts = ceil_div(e.dim * e.dim, tile_of("order"));
  go("first", {}, s.spans, s.kv);
  go("order", {{"groups", s.spans}, {"out", a["low_order"]}}, parts, s.kv);
  const int64_t side = tile_of("disperse");
  go("pool_tiles", of_queries, s.pairs, s.tiles);
  go("disperse", {}, s.pairs, ceil_div(s.tiles, side), ceil_div(s.blocks, side));
  go("score", {}, s.pairs, ceil_div(s.tiles, tile_of("score")));
  const float density = call.attributes.density;
  if (density > 0) {
    go("density" + other, {{"kept", exact_pairs(density, s.tiles * s.blocks)}}, s.pairs, 1);
  } else {
    go("limits", {}, s.pairs, 1);
  }
  go("route" + other, {}, s.tiles, s.pairs);
  if (s.probes > 0) {
    go("probe", {}, s.parts, s.pairs, ceil_div(s.probes, tile_of("probe")));
    go("merge", {}, ceil_div(s.probes, tile_of("merge")), s.pairs);
    go("estimate", {{"text_before", e.query_before}}, ceil_div(s.blocks, tile_of("estimate")),
       s.pairs, ceil_div(s.probes, tile_of("fit")));
    go("fit", of_queries, s.pairs, 1);
  } else {
    constexpr unsigned kOne = 0x3f800000;  // 1.0f
    fill(on, a["coefficients"], kOne, s.pairs * 2);
  }
  launch_attend(call, on, s, a);
  if (s.query_text > 0) go("text", {}, ceil_div(s.query_text, tile_of("text")), s.pairs);
}

}  // namespace freqopt
