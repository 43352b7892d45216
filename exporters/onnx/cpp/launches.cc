#include "launches.h"

#include <algorithm>
#include <mutex>
#include <utility>
#include <vector>

namespace freqopt {
namespace {

struct Loaded {
  void* function;
  std::vector<std::string> arguments;
  std::vector<std::pair<std::string, int64_t>> axes;  // of the grid
};

std::vector<std::string> words(const std::string& list) {
  std::vector<std::string> found;
  for (size_t at = 0; at < list.size();) {
    const size_t comma = std::min(list.find(',', at), list.size());
    found.push_back(list.substr(at, comma - at));
    at = comma + 1;
  }
  return found;
}

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
  Loaded loaded{nullptr, words(cubin.arguments), {}};
  driver.check(driver.ModuleLoadData(&module, cubin.image), doing);
  driver.check(driver.ModuleGetFunction(&loaded.function, module, cubin.symbol), doing);
  if (cubin.shared > 48 * 1024) {
    constexpr int kMaxDynamicShared = 8;
    driver.check(driver.FuncSetAttribute(loaded.function, kMaxDynamicShared, cubin.shared), doing);
  }
  for (const std::string& axis : words(cubin.grid)) {
    const size_t slash = axis.find('/');
    const bool whole = slash == std::string::npos;
    loaded.axes.emplace_back(axis.substr(0, slash), whole ? 1 : std::stoll(axis.substr(slash + 1)));
  }
  return cache.emplace(key, std::move(loaded)).first->second;
}

}  // namespace

Arguments tensors_of(const CudaPlan& plan, void* workspace) {
  Arguments a;
  for (const auto& [name, offset] : plan.offset) a[name] = static_cast<char*>(workspace) + offset;
  return a;
}

const Cubin* find(const Launcher& on, const std::string& kernel) {
  const int capability = on.device.capability;
  const Cubin* best = nullptr;
  for (int i = 0; i < kCubinCount; ++i) {
    const Cubin& c = kCubins[i];
    if (kernel != c.kernel || c.dtype != on.type || c.head_dim != on.head_dim ||
        (on.masked != kEither && c.masked != int(on.masked)) || c.capability > capability ||
        c.capability / 10 != capability / 10) {
      continue;
    }
    if (!best || c.capability > best->capability) best = &c;
  }
  return best;
}

const Cubin& choose(const Launcher& on, const std::string& kernel) {
  if (const Cubin* best = find(on, kernel)) return *best;
  static const char* const types[] = {"float32", "float16", "bfloat16"};
  throw std::runtime_error(
      "this library has no " + kernel + " kernel for sm_" + std::to_string(on.device.capability) +
      ", " + types[on.type] + ", head_dim " + std::to_string(on.head_dim) +
      (on.masked == kMasked ? ", key mask" : "") +
      "; export again with this GPU's capability, or run without the library");
}

void launch(const Launcher& on, const std::string& kernel, const Arguments& shared,
            const Arguments& own) {
  const Cubin& cubin = choose(on, kernel);
  const Loaded& loaded = load(cubin, on.device);
  auto value = [&](const std::string& name) -> const Argument& {
    const auto override_ = own.find(name);
    if (override_ != own.end()) return override_->second;
    const auto common = shared.find(name);
    if (common == shared.end()) {
      throw std::runtime_error(kernel + " wants an argument " + name + " that nobody gives");
    }
    return common->second;
  };
  unsigned grid[3] = {1, 1, 1};
  for (size_t i = 0; i < loaded.axes.size(); ++i) {
    const auto& [name, part] = loaded.axes[i];
    grid[i] = unsigned(ceil_div(value(name).number(), part));
    if (grid[i] == 0) return;
  }
  std::vector<Argument> values;
  values.reserve(loaded.arguments.size() + 2);
  for (const std::string& name : loaded.arguments) values.push_back(value(name));
  values.resize(values.size() + 2);  // Triton's two scratch pointers, unused
  std::vector<void*> pointers;
  pointers.reserve(values.size());
  for (Argument& each : values) pointers.push_back(each.address());
  const Driver& driver = Driver::get();
  driver.check(driver.LaunchKernel(loaded.function, grid[0], grid[1], grid[2],
                                   unsigned(cubin.warps * 32), 1, 1, unsigned(cubin.shared),
                                   on.stream, pointers.data(), nullptr),
               "launching the " + kernel + " kernel");
}

void fill(const Launcher& on, const Argument& to, unsigned word, int64_t words) {
  const Driver& driver = Driver::get();
  driver.check(driver.MemsetD32Async(to.bits, word, size_t(words), on.stream), "filling a buffer");
}

}  // namespace freqopt
