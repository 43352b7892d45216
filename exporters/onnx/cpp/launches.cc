#include "launches.h"

#include <mutex>
#include <utility>
#include <vector>

namespace freqopt {
namespace {

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
            const Arguments& own, int64_t x, int64_t y, int64_t z) {
  if (x == 0 || y == 0 || z == 0) return;
  const Cubin& cubin = choose(on, kernel);
  const Loaded& loaded = load(cubin, on.device);
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
                                   on.stream, pointers.data(), nullptr),
               "launching the " + kernel + " kernel");
}

void fill(const Launcher& on, const Argument& to, unsigned word, int64_t words) {
  const Driver& driver = Driver::get();
  driver.check(driver.MemsetD32Async(to.bits, word, size_t(words), on.stream), "filling a buffer");
}

}  // namespace freqopt
