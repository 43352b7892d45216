// A test operator, freqopt.test::Slots: calls the kernel-context slots that our kernels do, and their
// neighbours, so that a wrong number in ort_abi.h crashes here and not on a GPU server.
#include "ort_abi.h"

namespace {
using HasValue = ort::Function<192, ort::Status*(const ort::Value*, int*)>;
using AllocatorInfo = ort::Function<77, ort::Status*(const ort::Allocator*, const ort::MemoryInfo**)>;
using InputCount = ort::GetInputCount;

ort::Api* g_api;

ort::Status* fail(const char* what) { return ort::CreateStatus::call(g_api, ort::kFail, what); }

ort::Status* compute(void*, ort::KernelContext* ctx) {
  size_t inputs = 0;
  const ort::Value* in = nullptr;
  if (auto* s = InputCount::call(g_api, ctx, &inputs)) return s;
  if (inputs != 1) return fail("slot 88: wrong number of inputs");
  if (auto* s = ort::GetInput::call(g_api, ctx, 0, &in)) return s;
  int has = 0;
  if (auto* s = HasValue::call(g_api, in, &has)) return s;
  if (!has) return fail("slot 192: the input has no value");
  void* stream = reinterpret_cast<void*>(1);
  if (auto* s = ort::GetComputeStream::call(g_api, ctx, &stream)) return s;
  if (stream) return fail("slot 193: the CPU provider has no stream");
  const ort::MemoryInfo *memory = nullptr, *again = nullptr;
  if (auto* s = ort::GetTensorMemoryInfo::call(g_api, in, &memory)) return s;
  if (!memory) return fail("slot 194: no memory info");
  ort::Allocator* allocator = nullptr;
  if (auto* s = ort::GetAllocator::call(g_api, ctx, memory, &allocator)) return s;
  void* block = nullptr;
  if (auto* s = ort::AllocatorAlloc::call(g_api, allocator, 1 << 20, &block)) return s;
  for (size_t i = 0; i < (1 << 20); i += 4096) static_cast<char*>(block)[i] = 1;
  if (auto* s = AllocatorInfo::call(g_api, allocator, &again)) return s;
  if (!again) return fail("slot 77: no allocator info");
  if (auto* s = ort::AllocatorFree::call(g_api, allocator, block)) return s;
  ort::ReleaseAllocator::call(g_api, allocator);
  ort::TensorInfo* info = nullptr;
  size_t rank = 0;
  ort::ElementType type = ort::kUndefined;
  if (auto* s = ort::GetTensorTypeAndShape::call(g_api, in, &info)) return s;
  if (auto* s = ort::GetDimensionsCount::call(g_api, info, &rank)) return s;
  if (auto* s = ort::GetElementType::call(g_api, info, &type)) return s;
  ort::ReleaseTensorInfo::call(g_api, info);
  if (rank != 1 || type != ort::kInt64) return fail("slots 60, 61: wrong type or rank");
  ort::Value* out = nullptr;
  void* data = nullptr;
  const int64_t one = 1;
  if (auto* s = ort::GetOutput::call(g_api, ctx, 0, &one, 1, &out)) return s;
  if (auto* s = ort::GetTensorMutableData::call(g_api, out, &data)) return s;
  *static_cast<int64_t*>(data) = 193;
  return nullptr;
}
}  // namespace

extern "C" __attribute__((visibility("default"))) ort::Status* RegisterCustomOps(
    ort::SessionOptions* options, const ort::ApiBase* base) {
  g_api = base->GetApi(ort::kApiVersion);
  static ort::CustomOp op;
  op.name = [](const ort::CustomOp*) { return "Slots"; };
  op.provider = [](const ort::CustomOp*) { return "CPUExecutionProvider"; };
  op.input_count = op.output_count = [](const ort::CustomOp*) { return size_t(1); };
  op.input_type = op.output_type = [](const ort::CustomOp*, size_t) { return ort::kInt64; };
  op.input_characteristic = op.output_characteristic = [](const ort::CustomOp*, size_t) { return 0; };
  op.input_memory = [](const ort::CustomOp*, size_t) { return ort::kDefault; };
  op.variadic_input_min = op.variadic_output_min = [](const ort::CustomOp*) { return 1; };
  op.variadic_input_same = op.variadic_output_same = [](const ort::CustomOp*) { return 1; };
  op.create_kernel_v2 = [](const ort::CustomOp*, ort::Api*, const ort::KernelInfo*,
                           void** kernel) -> ort::Status* {
    *kernel = &op;
    return nullptr;
  };
  op.compute_v2 = compute;
  op.destroy = [](void*) {};
  op.start_version = op.end_version = [](const ort::CustomOp*) { return 1; };
  ort::Domain* domain = nullptr;
  if (auto* s = ort::CreateCustomOpDomain::call(g_api, "freqopt.test", &domain)) return s;
  if (auto* s = ort::CustomOpDomainAdd::call(g_api, domain, &op)) return s;
  return ort::AddCustomOpDomain::call(g_api, options, domain);
}
