// Plans and launches one call on whatever driver FREQOPT_LIBCUDA names; pointers are made up.
//
// launch BATCH HEADS KV_HEADS LENGTH DIM TOKENS BEFORE DENSITY PROBES TYPE MASKED
//        [QUERY_LENGTH QUERIES QUERY_BEFORE OWN ORDER_ROWS QUERY_ORDER_ROWS]
// launch order BATCH HEADS LENGTH DIM TOKENS BEFORE CHUNK_HEADS LARGEST_CHUNK TYPE
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <string>

#include "order_cuda.h"
#include "split_cuda.h"

namespace {

void* address(uintptr_t at) { return reinterpret_cast<void*>(at); }

void describe(const freqopt::CudaPlan& plan) {
  for (int i = 0; i < freqopt::kCubinCount; ++i) {
    const freqopt::Cubin& c = freqopt::kCubins[i];
    std::printf("cubin %p %s\n", static_cast<const void*>(c.image), c.kernel);
  }
  for (const auto& [name, offset] : plan.offset) std::printf("buffer %s %zu\n", name.c_str(), offset);
  std::printf("bytes %zu\n", plan.workspace_bytes);
}

template <typename Number>
void split(int argc, Number n, float density) {
  freqopt::CudaCall call{};
  const bool more = argc == 18;
  call.extents = {n(1), n(2), n(3), n(4), n(5), n(6), n(7), n(more ? 12 : 4), n(more ? 13 : 6),
                  n(more ? 14 : 7)};
  call.attributes = {0.125f, density, n(9), more ? n(15) != 0 : true};
  call.order_rows = more ? n(16) : 1, call.query_order_rows = more ? n(17) : 1;
  call.type = int(n(10));
  call.mask_batch = n(11) ? n(1) : 1, call.mask_length = n(11) ? n(4) : 1;
  call.query = address(0x1000), call.key = address(0x2000), call.value = address(0x3000);
  call.budget = address(0x4000), call.key_mask = address(0x5000), call.order = address(0x6000);
  call.query_order = address(more ? 0x8000 : 0x6000);
  call.out = address(0x7000), call.stream = address(0x77);
  const freqopt::CudaPlan plan = freqopt::plan_cuda(call);
  describe(plan);
  freqopt::launch_cuda(call, plan, address(0x100000));
}

template <typename Number>
void order(Number n) {
  freqopt::OrderCall call{};
  call.batch = n(2), call.heads = n(3), call.length = n(4), call.dim = n(5);
  call.tokens = n(6), call.text_before = n(7), call.chunk_heads = n(8), call.largest_chunk = n(9);
  call.type = int(n(10));
  call.tokens_of = address(0x2000), call.base = address(0x6000), call.chunks = address(0x9000);
  call.order = address(0xa000), call.stream = address(0x77);
  const freqopt::CudaPlan plan = freqopt::plan_order(call);
  describe(plan);
  freqopt::launch_order(call, plan, address(0x100000));
}

}  // namespace

int main(int argc, char** argv) {
  const bool of_order = argc > 1 && std::string(argv[1]) == "order";
  if (argc != (of_order ? 11 : 12) && argc != 18) return 2;
  auto n = [&](int i) -> int64_t { return std::atoll(argv[i]); };
  try {
    of_order ? order(n) : split(argc, n, float(std::atof(argv[8])));
    const freqopt::AttendCounts n_attend = freqopt::attend_counts();
    std::printf("counts %lld %lld %lld\n", static_cast<long long>(n_attend.hopper),
                static_cast<long long>(n_attend.portable), static_cast<long long>(n_attend.unmapped));
  } catch (const std::exception& failed) {
    std::printf("error %s\n", failed.what());
  }
  return 0;
}
