// The CUDA driver, opened at run time: the library loads on machines without one.
#pragma once
#include <dlfcn.h>

#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace freqopt {

// CUtensorMap: what the tensor memory accelerator knows about a tensor. Opaque, passed by value.
struct alignas(64) TensorMap {
  unsigned char opaque[128];
};

struct Copy2D {  // CUDA_MEMCPY2D, between device addresses
  size_t source_x = 0, source_y = 0;
  int source_type = 2;
  const void* source_host = nullptr;
  const void* source = nullptr;
  void* source_array = nullptr;
  size_t source_pitch = 0, target_x = 0, target_y = 0;
  int target_type = 2;
  void* target_host = nullptr;
  void* target = nullptr;
  void* target_array = nullptr;
  size_t target_pitch = 0, width = 0, height = 0;
};

// The few driver functions used, with their documented C signatures.
struct Driver {
  int (*GetErrorString)(int, const char**);
  int (*CtxGetDevice)(int*);
  int (*DeviceGetAttribute)(int*, int, int);
  int (*ModuleLoadData)(void**, const void*);
  int (*ModuleGetFunction)(void**, void*, const char*);
  int (*FuncSetAttribute)(void*, int, int);
  int (*MemsetD32Async)(unsigned long long, unsigned, size_t, void*);
  int (*Memcpy2DAsync)(const Copy2D*, void*);
  int (*LaunchKernel)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                      void*, void**, void**);
  // Null in drivers older than CUDA 12.0.
  int (*TensorMapEncodeTiled)(TensorMap*, int, uint32_t, void*, const uint64_t*, const uint64_t*,
                              const uint32_t*, const uint32_t*, int, int, int, int);

  static const Driver& get() {
    static const Driver driver = open();
    return driver;
  }

  void check(int code, const std::string& doing) const {
    if (code == 0) return;
    const char* text = nullptr;
    GetErrorString(code, &text);
    throw std::runtime_error(doing + " failed: " + (text ? text : "unknown CUDA error") + " (" +
                             std::to_string(code) + ")");
  }

 private:
  static Driver open() {
    const char* path = std::getenv("FREQOPT_LIBCUDA");
    void* handle = dlopen(path ? path : "libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!handle) throw std::runtime_error(std::string("the CUDA driver cannot be opened: ") + dlerror());
    Driver d;
    auto find = [&](auto& slot, const char* name) {
      slot = reinterpret_cast<std::decay_t<decltype(slot)>>(dlsym(handle, name));
      return slot != nullptr;
    };
    auto set = [&](auto& slot, const char* name) {
      if (!find(slot, name)) throw std::runtime_error(std::string("the CUDA driver has no ") + name);
    };
    set(d.GetErrorString, "cuGetErrorString");
    set(d.CtxGetDevice, "cuCtxGetDevice");
    set(d.DeviceGetAttribute, "cuDeviceGetAttribute");
    set(d.ModuleLoadData, "cuModuleLoadData");
    set(d.ModuleGetFunction, "cuModuleGetFunction");
    set(d.FuncSetAttribute, "cuFuncSetAttribute");
    set(d.MemsetD32Async, "cuMemsetD32Async");
    set(d.Memcpy2DAsync, "cuMemcpy2DAsync_v2");
    set(d.LaunchKernel, "cuLaunchKernel");
    find(d.TensorMapEncodeTiled, "cuTensorMapEncodeTiled");
    return d;
  }
};

struct Device {
  int ordinal = 0, capability = 0;
};

inline Device current_device() {
  const Driver& driver = Driver::get();
  Device device;
  int major = 0, minor = 0;
  driver.check(driver.CtxGetDevice(&device.ordinal), "finding the current GPU");
  driver.check(driver.DeviceGetAttribute(&major, 75, device.ordinal), "asking the GPU's capability");
  driver.check(driver.DeviceGetAttribute(&minor, 76, device.ordinal), "asking the GPU's capability");
  device.capability = major * 10 + minor;
  return device;
}

// A map of `rows` contiguous rows of `columns` half-precision numbers, loaded in boxes of 64 by 64
// with a swizzle of 128 bytes: the OPERAND layout and the boxes of kernels/hopper/attend.py.
inline TensorMap map_rows(void* data, int64_t rows, int64_t columns, bool bfloat16) {
  constexpr int kFloat16 = 6, kBfloat16 = 9, kSwizzle128 = 3, kPromote128 = 2, kNone = 0;
  constexpr uint32_t box[] = {64, 64}, every[] = {1, 1};
  const uint64_t extents[] = {uint64_t(columns), uint64_t(rows)};  // innermost first
  const uint64_t strides[] = {uint64_t(columns) * 2};              // bytes, of all but the innermost
  const Driver& driver = Driver::get();
  TensorMap map;
  driver.check(driver.TensorMapEncodeTiled(&map, bfloat16 ? kBfloat16 : kFloat16, 2, data, extents,
                                           strides, box, every, kNone, kSwizzle128, kPromote128, kNone),
               "encoding a tensor map");
  return map;
}

}  // namespace freqopt
