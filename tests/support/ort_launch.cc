// Plans and launches one call on whatever driver FREQOPT_LIBCUDA names; pointers are made up.
#include <cstdio>
#include <cstdlib>
#include <exception>

#include "split_cuda.h"

int main(int argc, char** argv) {
  if (argc != 12) return 2;
  auto n = [&](int i) { return std::atoll(argv[i]); };
  auto address = [](uintptr_t at) { return reinterpret_cast<void*>(at); };
  freqopt::CudaCall call;
  call.extents = {n(1), n(2), n(3), n(4), n(5), n(6), n(7)};
  call.attributes = {0.125f, float(std::atof(argv[8])), n(9)};
  call.type = int(n(10));
  call.mask_batch = n(11) ? n(1) : 1, call.mask_length = n(11) ? n(4) : 1;
  call.query = address(0x1000), call.key = address(0x2000), call.value = address(0x3000);
  call.budget = address(0x4000), call.key_mask = address(0x5000), call.order = address(0x6000);
  call.out = address(0x7000), call.stream = address(0x77);
  try {
    const freqopt::CudaPlan plan = freqopt::plan_cuda(call);
    for (const auto& [name, offset] : plan.offset) std::printf("buffer %s %zu\n", name.c_str(), offset);
    std::printf("bytes %zu\n", plan.workspace_bytes);
    freqopt::launch_cuda(call, plan, address(0x100000));
    const freqopt::AttendCounts n_attend = freqopt::attend_counts();
    std::printf("counts %lld %lld %lld\n", static_cast<long long>(n_attend.hopper),
                static_cast<long long>(n_attend.portable), static_cast<long long>(n_attend.unmapped));
  } catch (const std::exception& failed) {
    std::printf("error %s\n", failed.what());
  }
  return 0;
}
