#include "split_cuda.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <deque>
#include <mutex>
#include <stdexcept>
#include <vector>

#include "cuda_driver.h"

namespace freqopt {
namespace {

constexpr int64_t kKeyBlock = 64, kQueryTile = 128, kGroup = 4, kOrderGroup = 32;
constexpr int64_t kProbePrograms = 264, kMaxParts = 64, kMoments = 16, kUnit = 16;
constexpr int64_t kPooledTiles = 4, kSubTiles = 16;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Channels of the kernels' tiles, as freqopt.kernels.tiles.padded_dim.
int64_t padded_dim(int64_t dim) {
  int64_t padded = 16;
  while (padded < dim) padded *= 2;
  return padded;
}

bool masked(const CudaCall& call) { return call.mask_length != 1; }

// The best entry for a kernel, or null: code runs on later chips of its own generation.
const Cubin* find(const CudaCall& call, const std::string& kernel, int capability) {
  const Cubin* best = nullptr;
  for (int i = 0; i < kCubinCount; ++i) {
    const Cubin& c = kCubins[i];
    if (kernel != c.kernel || c.dtype != call.type || c.head_dim != call.extents.dim ||
        bool(c.masked) != masked(call) || c.capability > capability ||
        c.capability / 10 != capability / 10) {
      continue;
    }
    if (!best || c.capability > best->capability) best = &c;
  }
  return best;
}

const Cubin& choose(const CudaCall& call, const std::string& kernel, int capability) {
  if (const Cubin* best = find(call, kernel, capability)) return *best;
  static const char* const types[] = {"float32", "float16", "bfloat16"};
  throw std::runtime_error(
      "this library has no " + kernel + " kernel for sm_" + std::to_string(capability) + ", " +
      types[call.type] + ", head_dim " + std::to_string(call.extents.dim) +
      (masked(call) ? ", key mask" : "") +
      "; export again with this GPU's capability, or run without the library");
}

struct Loaded {
  void* function;
  std::vector<std::string> arguments;
};

const Loaded& load(const Cubin& cubin, const Device& device) {
  static std::mutex mutex;
  static std::map<std::pair<int, const Cubin*>, Loaded> cache;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto key = std::make_pair(device.ordinal, &cubin);
  const auto found = cache.find(key);
  if (found != cache.end()) return found->second;
  const Driver& driver = Driver::get();
  const std::string doing = std::string("loading the kernel ") + cubin.symbol;
  void* module = nullptr;
  Loaded loaded{nullptr, {}};
  driver.check(driver.ModuleLoadData(&module, cubin.image), doing);
  driver.check(driver.ModuleGetFunction(&loaded.function, module, cubin.symbol), doing);
  if (cubin.shared > 48 * 1024) {
    constexpr int kMaxDynamicShared = 8;
    driver.check(driver.FuncSetAttribute(loaded.function, kMaxDynamicShared, cubin.shared), doing);
  }
  std::string names = cubin.arguments;
  for (size_t at = 0; at != std::string::npos && !names.empty();) {
    const size_t comma = names.find(',', at);
    loaded.arguments.push_back(names.substr(at, comma == std::string::npos ? comma : comma - at));
    at = comma == std::string::npos ? comma : comma + 1;
  }
  return cache.emplace(key, std::move(loaded)).first->second;
}

struct Argument {  // a tensor map, or eight bytes that hold a pointer, an integer or a float
  uint64_t bits = 0;
  const TensorMap* map = nullptr;
  Argument() = default;
  Argument(const TensorMap* m) : map(m) {}
  Argument(void* p) { std::memcpy(&bits, &p, sizeof p); }
  Argument(int64_t v) {
    if (v > INT32_MAX) throw std::runtime_error("an extent of the tensors exceeds 2^31");
    const int32_t small = int32_t(v);
    std::memcpy(&bits, &small, 4);
  }
  Argument(float v) { std::memcpy(&bits, &v, 4); }
  void* pointer() const {
    void* p = nullptr;
    std::memcpy(&p, &bits, sizeof p);
    return p;
  }
  void* address() { return map ? const_cast<TensorMap*>(map) : static_cast<void*>(&bits); }
};
using Arguments = std::map<std::string, Argument>;

struct Sizes {
  explicit Sizes(const CudaCall& c) {
    const Extents& e = c.extents;
    pairs = e.batch * e.heads, kv = e.batch * e.kv_heads;
    blocks = ceil_div(e.tokens, kKeyBlock), tiles = ceil_div(e.tokens, kQueryTile);
    groups = ceil_div(blocks, kGroup), spans = ceil_div(blocks, kOrderGroup);
    text = e.length - e.tokens;
    probes = std::min(c.attributes.probes, e.tokens);
    parts = std::max<int64_t>(std::min({kProbePrograms / pairs, kMaxParts, blocks}), 1);
  }
  int64_t pairs, kv, blocks, tiles, groups, spans, text, probes, parts;
};

void launch(const CudaCall& call, const Device& device, const std::string& kernel,
            const Arguments& shared, Arguments own, int64_t x, int64_t y, int64_t z = 1) {
  if (x == 0 || y == 0 || z == 0) return;
  const Cubin& cubin = choose(call, kernel, device.capability);
  const Loaded& loaded = load(cubin, device);
  std::vector<Argument> values;
  for (const std::string& name : loaded.arguments) {
    const auto override_ = own.find(name);
    const auto common = shared.find(name);
    if (override_ == own.end() && common == shared.end()) {
      throw std::runtime_error(kernel + " wants an argument " + name + " that nobody gives");
    }
    values.push_back(override_ != own.end() ? override_->second : common->second);
  }
  values.resize(values.size() + 2);  // Triton's two scratch pointers, unused
  std::vector<void*> pointers;
  for (Argument& value : values) pointers.push_back(value.address());
  const Driver& driver = Driver::get();
  driver.check(driver.LaunchKernel(loaded.function, unsigned(x), unsigned(y), unsigned(z),
                                   unsigned(cubin.warps * 32), 1, 1, unsigned(cubin.shared),
                                   call.stream, pointers.data(), nullptr),
               "launching the " + kernel + " kernel");
}

std::atomic<int64_t> g_hopper{0}, g_portable{0}, g_unmapped{0};

// The Hopper kernel, or null where freqopt.kernels.hopper.launch.applies() is false: the table has it for
// the variants that it serves.
const Cubin* find_hopper(const CudaCall& call, const Device& device) {
  return device.capability == 90 ? find(call, "attend_hopper", 90) : nullptr;
}

int64_t whole_tiles(int64_t rows) { return ceil_div(rows, kQueryTile) * kQueryTile; }

void fill(const Argument& to, unsigned word, int64_t words, const CudaCall& call) {
  const Driver& driver = Driver::get();
  driver.check(driver.MemsetD32Async(to.bits, word, size_t(words), call.stream), "filling a buffer");
}

// The text tokens of (kv, N, D) `from`, with zeros up to whole tiles: the kernel weighs the rows
// behind the text with 0, so they must be numbers.
void gather_text(const CudaCall& call, const Sizes& s, void* from, const Argument& to) {
  const Extents& e = call.extents;
  const int64_t row = e.dim * 2, padded = whole_tiles(s.text);
  if (padded > s.text) fill(to, 0, s.kv * padded * row / 4, call);
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

void launch_hopper(const CudaCall& call, const Device& device, const Sizes& s, const Cubin& cubin,
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
    gather_text(call, s, call.key, a.at("text_key_rows"));
    gather_text(call, s, call.value, a.at("text_value_rows"));
    const int64_t rows = s.kv * whole_tiles(s.text);
    map("text_key", "text_key_rows", rows), map("text_value", "text_value_rows", rows);
  } else {  // never read
    for (const char* part : {".map", ".extent0", ".extent1", ".stride0", ".stride1"}) {
      own[std::string("text_key") + part] = own[std::string("key") + part];
      own[std::string("text_value") + part] = own[std::string("value") + part];
    }
  }
  launch(call, device, "attend_hopper", a, own, ceil_div(call.extents.tokens, cubin.tile), s.pairs);
}

// The fused attention, by the fastest kernel that serves the call.
void launch_attend(const CudaCall& call, const Device& device, const Sizes& s, const Arguments& a) {
  const Cubin* hopper = find_hopper(call, device);
  if (hopper && Driver::get().TensorMapEncodeTiled) {
    launch_hopper(call, device, s, *hopper, a);
    ++g_hopper;
    return;
  }
  const int64_t rows = choose(call, "attend", device.capability).tile;
  launch(call, device, "attend", a, {}, ceil_div(call.extents.tokens, rows), s.pairs);
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
  const Device device = current_device();
  choose(call, "attend", device.capability);  // say early that nothing fits
  CudaPlan plan;
  size_t at = 0;
  auto add = [&](const char* name, int64_t elements, int64_t bytes) {
    plan.offset[name] = at;
    at += size_t(ceil_div(std::max<int64_t>(elements, 1) * bytes, 256)) * 256;
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
  if (s.text > 0 && find_hopper(call, device)) {
    const int64_t text = s.kv * whole_tiles(s.text) * d;
    add("text_key_rows", text, own), add("text_value_rows", text, own);
  }
  plan.workspace_bytes = at;
  return plan;
}

void launch_cuda(const CudaCall& call, const CudaPlan& plan, void* workspace) {
  const Sizes s(call);
  const Extents& e = call.extents;
  const Device device = current_device();
  Arguments a;
  for (const auto& [name, offset] : plan.offset) a[name] = static_cast<char*>(workspace) + offset;
  const int64_t rows = e.length * e.dim;
  a["query"] = call.query, a["budget"] = call.budget, a["order"] = call.order;
  a["key"] = a["key_out"], a["value"] = a["value_out"];
  a["text_key"] = call.key, a["text_value"] = call.value, a["out"] = call.out;
  a["key_mask"] = masked(call) ? Argument(call.key_mask) : a["route"];
  a["threshold"] = a["limits"], a["peak_out"] = a["peak"], a["mass_out"] = a["mass"];
  a["logit_out"] = a["logit"], a["term_out"] = a["term"];
  for (const char* n : {"stride_qn", "stride_kn", "stride_vn", "stride_on"}) a[n] = e.dim;
  for (const char* n : {"stride_qh", "stride_kh", "stride_vh", "stride_oh"}) a[n] = rows;
  for (const char* n : {"stride_qb", "stride_ob"}) a[n] = e.heads * rows;
  for (const char* n : {"stride_kb", "stride_vb"}) a[n] = e.kv_heads * rows;
  a["stride_mb"] = int64_t(masked(call) && call.mask_batch > 1 ? e.length : 0);
  a["heads"] = e.heads, a["group_size"] = e.heads / e.kv_heads, a["tokens"] = e.tokens;
  a["tiles"] = s.tiles, a["blocks"] = s.blocks, a["groups"] = s.groups, a["text"] = s.text;
  a["text_before"] = e.text_before, a["probes"] = s.probes, a["parts"] = s.parts;
  a["cells"] = e.dim * e.dim, a["scale"] = call.attributes.scale;

  auto tile_of = [&](const char* kernel) { return choose(call, kernel, device.capability).tile; };
  auto go = [&](const char* kernel, Arguments own, int64_t x, int64_t y, int64_t z = 1) {
    launch(call, device, kernel, a, std::move(own), x, y, z);
  };
  go("summarise", {{"key", call.key}, {"value", call.value}, {"heads", e.kv_heads}}, s.kv, s.groups);
  go("total", {}, ceil_div(padded_dim(e.dim), tile_of("total")), s.kv);
  go("centre", {}, ceil_div(s.blocks, tile_of("centre")), s.kv);
  const int64_t parts = ceil_div(e.dim * e.dim, tile_of("order"));
  go("first", {}, s.spans, s.kv);
  go("order", {{"groups", s.spans}, {"out", a["low_order"]}}, parts, s.kv);
  const int64_t side = tile_of("disperse");
  go("pool_tiles", {}, s.pairs, s.tiles);
  go("disperse", {}, s.pairs, ceil_div(s.tiles, side), ceil_div(s.blocks, side));
  go("score", {}, s.pairs, ceil_div(s.tiles, tile_of("score")));
  const float density = call.attributes.density;
  if (density > 0) {
    go("density", {{"kept", exact_pairs(density, s.tiles * s.blocks)}}, s.pairs, 1);
  } else {
    go("limits", {}, s.pairs, 1);
  }
  go("route", {}, s.tiles, s.pairs);
  if (s.probes > 0) {
    go("probe", {}, s.parts, s.pairs, ceil_div(s.probes, tile_of("probe")));
    go("merge", {}, ceil_div(s.probes, tile_of("merge")), s.pairs);
    go("estimate", {}, ceil_div(s.blocks, tile_of("estimate")), s.pairs,
       ceil_div(s.probes, tile_of("fit")));
    go("fit", {}, s.pairs, 1);
  } else {
    constexpr unsigned kOne = 0x3f800000;  // 1.0f
    fill(a["coefficients"], kOne, s.pairs * 2, call);
  }
  launch_attend(call, device, s, a);
  if (s.text > 0) go("text", {}, ceil_div(s.text, tile_of("text")), s.pairs);
}

}  // namespace freqopt
