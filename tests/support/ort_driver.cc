// A CUDA driver that runs nothing: writes every launch, with its raw arguments, to standard output.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>

#include "cuda_driver.h"

namespace {
std::map<void*, std::string> g_names;
int capability() { return std::atoi(std::getenv("FAKE_CAPABILITY")); }
int count(const std::string& name) {  // FAKE_COUNTS: "symbol:arguments;..."
  const std::string all = ";" + std::string(std::getenv("FAKE_COUNTS"));
  return std::atoi(all.c_str() + all.find(";" + name + ":") + name.size() + 2);
}
}  // namespace

extern "C" {
int cuGetErrorString(int, const char** text) { return *text = "a made-up error", 0; }
int cuCtxGetDevice(int* device) { return *device = 0, 0; }
int cuDeviceGetAttribute(int* value, int attribute, int) {
  return *value = attribute == 75 ? capability() / 10 : capability() % 10, 0;
}
int cuModuleLoadData(void** module, const void* image) {
  if (std::getenv("FAKE_FAILURE")) return 209;
  return *module = const_cast<void*>(image), std::memcmp(image, "\x7f" "ELF", 4) ? 1 : 0;
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
  return g_names[module] = name, *function = module, 0;
}
int cuFuncSetAttribute(void* function, int attribute, int value) {
  return std::printf("shared %s %d %d\n", g_names[function].c_str(), attribute, value), 0;
}
int cuMemsetD32Async(unsigned long long to, unsigned value, size_t n, void*) {
  return std::printf("fill %llu %u %zu\n", to, value, n), 0;
}
int cuMemcpy2DAsync_v2(const freqopt::Copy2D* copy, void*) {
  std::printf("copy %zu %zu %zu %zu %zu %zu\n", reinterpret_cast<uintptr_t>(copy->source),
              reinterpret_cast<uintptr_t>(copy->target), copy->source_pitch, copy->target_pitch,
              copy->width, copy->height);
  return copy->source_type == 2 && copy->target_type == 2 && sizeof *copy == 128 ? 0 : 1;
}
#ifndef WITHOUT_TENSOR_MAPS
int cuTensorMapEncodeTiled(freqopt::TensorMap* map, int type, uint32_t rank, void* data,
                           const uint64_t* extents, const uint64_t* strides, const uint32_t* box,
                           const uint32_t* every, int interleave, int swizzle, int promotion, int fill) {
  if (reinterpret_cast<uintptr_t>(map) % 64 || rank != 2) return 1;
  const auto at = static_cast<unsigned long long>(reinterpret_cast<uintptr_t>(data));
  std::memset(map, 0, sizeof *map);
  std::memcpy(map, &at, sizeof at);  // so that a launch shows which map it was given
  std::printf("map %llu %d %llu %llu %llu %u %u %u %u %d %d %d %d\n", at, type,
              static_cast<unsigned long long>(extents[0]), static_cast<unsigned long long>(extents[1]),
              static_cast<unsigned long long>(strides[0]), box[0], box[1], every[0], every[1],
              interleave, swizzle, promotion, fill);
  return std::getenv("FAKE_MAP_FAILURE") ? 1 : 0;
}
#endif
int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned,
                   unsigned, unsigned shared, void* stream, void** arguments, void** extra) {
  const std::string& name = g_names[function];
  if (std::getenv("FAKE_IMAGES")) std::printf("image %p\n", function);
  std::printf("launch %s %u %u %u %u %u %llu", name.c_str(), x, y, z, threads, shared,
              static_cast<unsigned long long>(reinterpret_cast<uintptr_t>(stream)));
  for (int i = 0; i < count(name) + 2; ++i) {
    uint64_t bits;
    std::memcpy(&bits, arguments[i], 8);
    std::printf(" %llu", static_cast<unsigned long long>(bits));
  }
  std::printf("\n");
  return extra != nullptr;
}
}
