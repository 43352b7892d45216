// Registers freqopt::SplitAttention with onnxruntime's CUDA provider: one operator per element type.
//
// With this library a session on a GPU runs our kernels; without it, and on the CPU, the function
// body in the file. Every failure becomes a status with a message, never an exception or a wrong
// result.
#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

#include "ort_abi.h"
#include "split_cuda.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

#ifndef FREQOPT_PROVIDER  // a test has another, whose memory is the host's
#define FREQOPT_PROVIDER "CUDAExecutionProvider"
#endif

namespace freqopt {
namespace {

constexpr int kOpVersion = 2;  // freqopt.exporters.onnx.body.OP_VERSION

enum Input : size_t { kQuery, kKey, kValue, kBudget, kKeyMask, kOrder, kTextBefore, kInputs };

struct Failure : std::exception {  // carries a status out of nested calls
  explicit Failure(ort::Status* s) : status(s) {}
  ort::Status* status;
};

struct Tensor {
  void* data = nullptr;
  const ort::Value* value = nullptr;
  std::vector<int64_t> shape;
  int64_t size() const {
    int64_t n = 1;
    for (int64_t extent : shape) n *= extent;
    return n;
  }
};

struct Kernel {
  ort::Api* api;
  Attributes attributes;
  ort::ElementType type;

  void check(ort::Status* status) const {
    if (status) throw Failure(status);
  }
  void require(bool condition, const std::string& message) const {
    if (!condition) {
      throw Failure(ort::CreateStatus::call(api, ort::kInvalidArgument,
                                            ("freqopt::SplitAttention: " + message).c_str()));
    }
  }
  Tensor input(ort::KernelContext* ctx, size_t index) const {
    Tensor t;
    check(ort::GetInput::call(api, ctx, index, &t.value));
    ort::TensorInfo* info = nullptr;
    check(ort::GetTensorTypeAndShape::call(api, t.value, &info));
    size_t rank = 0;
    ort::Status* status = ort::GetDimensionsCount::call(api, info, &rank);
    t.shape.resize(rank);
    if (!status) status = ort::GetDimensions::call(api, info, t.shape.data(), rank);
    ort::ReleaseTensorInfo::call(api, info);
    check(status);
    check(ort::GetTensorMutableData::call(api, const_cast<ort::Value*>(t.value), &t.data));
    return t;
  }
};

std::string text(const std::vector<int64_t>& shape) {
  std::string s = "(";
  for (size_t i = 0; i < shape.size(); ++i) s += (i ? ", " : "") + std::to_string(shape[i]);
  return s + ")";
}

Extents check_extents(const Kernel& k, const std::vector<Tensor>& in) {
  const auto &q = in[kQuery].shape, &kv = in[kKey].shape, &mask = in[kKeyMask].shape;
  k.require(q.size() == 4 && kv.size() == 4 && kv == in[kValue].shape && q[0] == kv[0] &&
                q[2] == kv[2] && q[3] == kv[3],
            "query " + text(q) + ", key " + text(kv) + " and value " + text(in[kValue].shape) +
                " are not (batch, heads, tokens, head_dim) tensors of one self-attention");
  k.require(kv[1] > 0 && q[1] % kv[1] == 0, "query heads are not a multiple of the key heads");
  k.require(in[kBudget].shape == std::vector<int64_t>({q[1]}),
            "budget is " + text(in[kBudget].shape) + "; (heads) is supported");
  k.require(in[kOrder].shape.size() == 1, "order is not a vector");
  k.require(in[kTextBefore].size() == 1, "text_before does not hold one number");
  k.require(mask.size() == 2 && (mask[0] == 1 || mask[0] == q[0]) &&
                (mask[1] == 1 || mask[1] == q[2]),
            "key_mask " + text(mask) + " does not broadcast to (batch, tokens)");
  const int64_t before = *static_cast<const int64_t*>(in[kTextBefore].data);
  const int64_t tokens = in[kOrder].shape[0];
  k.require(tokens > 0 && before >= 0 && before + tokens <= q[2],
            std::to_string(before) + " text tokens before " + std::to_string(tokens) +
                " video tokens do not fit a sequence of " + std::to_string(q[2]));
  return {q[0], q[1], kv[1], q[2], q[3], tokens, before};
}

void* output(const Kernel& k, ort::KernelContext* ctx, const std::vector<int64_t>& shape) {
  ort::Value* value = nullptr;
  void* data = nullptr;
  k.check(ort::GetOutput::call(k.api, ctx, 0, shape.data(), shape.size(), &value));
  k.check(ort::GetTensorMutableData::call(k.api, value, &data));
  return data;
}

void compute(const Kernel& k, ort::KernelContext* ctx) {
  std::vector<Tensor> in;
  for (size_t i = 0; i < kInputs; ++i) in.push_back(k.input(ctx, i));
  CudaCall call;
  call.extents = check_extents(k, in);
  call.attributes = k.attributes;
  call.type = k.type == ort::kFloat ? 0 : k.type == ort::kHalf ? 1 : 2;
  call.mask_batch = in[kKeyMask].shape[0], call.mask_length = in[kKeyMask].shape[1];
  void** pointers[] = {&call.query, &call.key, &call.value, &call.budget, &call.key_mask, &call.order};
  for (size_t i = 0; i < kTextBefore; ++i) *pointers[i] = in[i].data;
  call.out = output(k, ctx, in[kQuery].shape);
  k.check(ort::GetComputeStream::call(k.api, ctx, &call.stream));
  const ort::MemoryInfo* memory = nullptr;
  ort::Allocator* allocator = nullptr;
  k.check(ort::GetTensorMemoryInfo::call(k.api, in[kQuery].value, &memory));
  k.check(ort::GetAllocator::call(k.api, ctx, memory, &allocator));
  // onnxruntime's allocator orders reuse of the workspace after the work queued on its own stream.
  struct Workspace {
    ort::Api* api;
    ort::Allocator* allocator;
    void* data = nullptr;
    ~Workspace() {
      if (data) ort::AllocatorFree::call(api, allocator, data);
      ort::ReleaseAllocator::call(api, allocator);
    }
  } workspace{k.api, allocator};
  try {
    const CudaPlan plan = plan_cuda(call);
    k.check(ort::AllocatorAlloc::call(k.api, allocator, plan.workspace_bytes, &workspace.data));
    launch_cuda(call, plan, workspace.data);
  } catch (const std::runtime_error& failed) {
    throw Failure(ort::CreateStatus::call(
        k.api, ort::kNotImplemented, (std::string("freqopt::SplitAttention: ") + failed.what()).c_str()));
  }
}

ort::Status* guarded(void* kernel, ort::KernelContext* ctx) {
  const Kernel& k = *static_cast<Kernel*>(kernel);
  try {
    compute(k, ctx);
    return nullptr;
  } catch (const Failure& failed) {
    return failed.status;
  } catch (const std::exception& failed) {
    return ort::CreateStatus::call(k.api, ort::kFail, failed.what());
  }
}

struct Op : ort::CustomOp {
  ort::ElementType type;
};

const Op& self(const ort::CustomOp* op) { return *static_cast<const Op*>(op); }

ort::Status* create(const ort::CustomOp* op, ort::Api* api, const ort::KernelInfo* info, void** out) {
  auto* k = new Kernel{api, {}, self(op).type};
  ort::Status* status = ort::GetAttributeFloat::call(api, info, "scale", &k->attributes.scale);
  if (!status) status = ort::GetAttributeFloat::call(api, info, "density", &k->attributes.density);
  if (!status) status = ort::GetAttributeInt::call(api, info, "probes", &k->attributes.probes);
  if (status) {
    delete k;
    return status;
  }
  *out = k;
  return nullptr;
}

ort::Status* infer(const ort::CustomOp* op, ort::ShapeContext* context);

Op make_op(ort::ElementType type) {
  Op op;
  op.type = type;
  op.name = [](const ort::CustomOp*) { return "SplitAttention"; };
  op.provider = [](const ort::CustomOp*) { return FREQOPT_PROVIDER; };
  op.input_count = [](const ort::CustomOp*) { return size_t(kInputs); };
  op.output_count = [](const ort::CustomOp*) { return size_t(1); };
  op.input_type = [](const ort::CustomOp* o, size_t i) {
    return i <= kValue    ? self(o).type
           : i == kBudget ? ort::kFloat
           : i == kKeyMask ? ort::kBool
                           : ort::kInt64;
  };
  op.output_type = [](const ort::CustomOp* o, size_t) { return self(o).type; };
  op.input_characteristic = [](const ort::CustomOp*, size_t) { return 0; };
  op.output_characteristic = [](const ort::CustomOp*, size_t) { return 0; };
  op.input_memory = [](const ort::CustomOp*, size_t i) {
    return i == kTextBefore ? ort::kCpuInput : ort::kDefault;
  };
  op.variadic_input_min = op.variadic_output_min = [](const ort::CustomOp*) { return 1; };
  op.variadic_input_same = op.variadic_output_same = [](const ort::CustomOp*) { return 1; };
  op.create_kernel_v2 = create;
  op.compute_v2 = guarded;
  op.destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.infer_shape = infer;
  op.start_version = op.end_version = [](const ort::CustomOp*) { return kOpVersion; };
  return op;
}

ort::Api* g_api = nullptr;  // shape inference is called without one

ort::Status* infer(const ort::CustomOp*, ort::ShapeContext* context) {
  ort::TensorInfo* info = nullptr;  // owned by the context
  ort::Status* status = ort::InferInputShape::call(g_api, context, kQuery, &info);
  return status ? status : ort::InferOutputShape::call(g_api, context, 0, info);
}

std::vector<Op>& all_ops() {
  static std::vector<Op> ops;
  if (ops.empty()) {
    for (ort::ElementType type : {ort::kFloat, ort::kHalf, ort::kBfloat16}) {
      ops.push_back(make_op(type));
    }
  }
  return ops;
}

}  // namespace
}  // namespace freqopt

EXPORT ort::Status* RegisterCustomOps(ort::SessionOptions* options, const ort::ApiBase* base) {
  ort::Api* api = base->GetApi(ort::kApiVersion);
  if (!api) {  // too old even to make a status of the version we know: every version has slot 0
    api = base->GetApi(1);
    const std::string message = std::string("libfreqopt_ort needs onnxruntime 1.17 or newer; this is ") +
                                base->GetVersionString();
    return ort::CreateStatus::call(api, ort::kNotImplemented, message.c_str());
  }
  freqopt::g_api = api;
  ort::Domain* domain = nullptr;  // lives as long as the process: sessions keep pointers into it
  if (ort::Status* status = ort::CreateCustomOpDomain::call(api, "freqopt", &domain)) return status;
  for (const freqopt::Op& op : freqopt::all_ops()) {
    if (ort::Status* status = ort::CustomOpDomainAdd::call(api, domain, &op)) return status;
  }
  return ort::AddCustomOpDomain::call(api, options, domain);
}

// What this file was built for, so that a runner can refuse a library of another version.
EXPORT const char* freqopt_ort_version() { return FREQOPT_ORT_VERSION; }

// Which kernel attended so far in this process: {hopper, portable, unmapped} as in AttendCounts.
EXPORT void freqopt_ort_attend_counts(int64_t* counts) {
  const freqopt::AttendCounts found = freqopt::attend_counts();
  counts[0] = found.hopper, counts[1] = found.portable, counts[2] = found.unmapped;
}
