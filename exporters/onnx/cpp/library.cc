// Registers freqopt::SplitAttention and freqopt::ContentOrder with onnxruntime's CUDA provider: one
// operator per element type.
//
// With this library a session on a GPU runs our kernels; without it, and on the CPU, the function
// bodies in the file. Every failure becomes a status with a message, never an exception or a wrong
// result.
#include <exception>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "order_cuda.h"
#include "ort_abi.h"
#include "split_cuda.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

#ifndef FREQOPT_PROVIDER  // a test has another, whose memory is the host's
#define FREQOPT_PROVIDER "CUDAExecutionProvider"
#endif

namespace freqopt {
namespace {

constexpr int kOpVersion = 3;  // freqopt.exporters.onnx.body.OP_VERSION

enum Input : size_t {
  kQuery, kKey, kValue, kBudget, kKeyMask, kOrder, kTextBefore, kQueryOrder, kQueryTextBefore,
  kInputs
};
enum OrderInput : size_t { kTokens, kBase, kChunks, kOrderTextBefore, kOrderInputs };

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

struct Kernel {  // an operator with its attributes, and what it calls of onnxruntime
  ort::Api* api;
  ort::ElementType type;
  const char* name;
  Kernel(ort::Api* a, ort::ElementType t, const char* n) : api(a), type(t), name(n) {}
  virtual ~Kernel() = default;
  virtual void compute(ort::KernelContext* ctx) const = 0;

  int type_code() const { return type == ort::kFloat ? 0 : type == ort::kHalf ? 1 : 2; }
  void check(ort::Status* status) const {
    if (status) throw Failure(status);
  }
  void require(bool condition, const std::string& message) const {
    if (!condition) {
      throw Failure(ort::CreateStatus::call(api, ort::kInvalidArgument,
                                            (std::string(name) + ": " + message).c_str()));
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
  void* output(ort::KernelContext* ctx, const std::vector<int64_t>& shape) const {
    ort::Value* value = nullptr;
    void* data = nullptr;
    check(ort::GetOutput::call(api, ctx, 0, shape.data(), shape.size(), &value));
    check(ort::GetTensorMutableData::call(api, value, &data));
    return data;
  }
  // Launches with a workspace where `beside` lies. onnxruntime's allocator orders its reuse after
  // the work queued on its own stream.
  template <typename Plan, typename Launch>
  void run(ort::KernelContext* ctx, const Tensor& beside, Plan make, Launch launch) const {
    const ort::MemoryInfo* memory = nullptr;
    ort::Allocator* allocator = nullptr;
    check(ort::GetTensorMemoryInfo::call(api, beside.value, &memory));
    check(ort::GetAllocator::call(api, ctx, memory, &allocator));
    struct Workspace {
      ort::Api* api;
      ort::Allocator* allocator;
      void* data = nullptr;
      ~Workspace() {
        if (data) ort::AllocatorFree::call(api, allocator, data);
        ort::ReleaseAllocator::call(api, allocator);
      }
    } workspace{api, allocator};
    try {
      const CudaPlan plan = make();
      check(ort::AllocatorAlloc::call(api, allocator, plan.workspace_bytes, &workspace.data));
      launch(plan, workspace.data);
    } catch (const std::runtime_error& failed) {
      throw Failure(ort::CreateStatus::call(api, ort::kNotImplemented,
                                            (std::string(name) + ": " + failed.what()).c_str()));
    }
  }
};

std::string text(const std::vector<int64_t>& shape) {
  std::string s = "(";
  for (size_t i = 0; i < shape.size(); ++i) s += (i ? ", " : "") + std::to_string(shape[i]);
  return s + ")";
}

int64_t number(const Kernel& k, const Tensor& t, const char* what) {  // one, on the host
  k.require(t.size() == 1, std::string(what) + " does not hold one number");
  return *static_cast<const int64_t*>(t.data);
}

void check_fit(const Kernel& k, int64_t before, int64_t tokens, int64_t length, const char* whose) {
  k.require(tokens > 0 && before >= 0 && before + tokens <= length,
            std::to_string(before) + " text tokens before " + std::to_string(tokens) + " others do" +
                " not fit a sequence of " + std::to_string(length) + whose);
}

struct SplitKernel final : Kernel {
  Attributes attributes{};
  using Kernel::Kernel;

  void check_extents(const std::vector<Tensor>& in, CudaCall* call) const {
    const auto &q = in[kQuery].shape, &kv = in[kKey].shape, &mask = in[kKeyMask].shape;
    require(q.size() == 4 && kv.size() == 4 && kv == in[kValue].shape && q[0] == kv[0] &&
                (q[2] == kv[2] || !attributes.own) && q[3] == kv[3],
            "query " + text(q) + ", key " + text(kv) + " and value " + text(in[kValue].shape) +
                " are not (batch, heads, tokens, head_dim) tensors of one " +
                (attributes.own ? "self-attention" : "attention"));
    require(kv[1] > 0 && q[1] % kv[1] == 0, "query heads are not a multiple of the key heads");
    require(in[kBudget].shape == std::vector<int64_t>({q[1]}),
            "budget is " + text(in[kBudget].shape) + "; (heads) is supported");
    require(mask.size() == 2 && (mask[0] == 1 || mask[0] == q[0]) &&
                (mask[1] == 1 || mask[1] == kv[2]),
            "key_mask " + text(mask) + " does not broadcast to (batch, tokens)");
    const int64_t before = number(*this, in[kTextBefore], "text_before");
    const int64_t query_before = number(*this, in[kQueryTextBefore], "query_text_before");
    const int64_t kv_pairs = kv[0] * kv[1], pairs = q[0] * q[1];
    const auto of_keys = order_of(in[kOrder], "order", kv_pairs, kv_pairs);
    const auto of_queries = order_of(in[kQueryOrder], "query_order", pairs, kv_pairs);
    check_fit(*this, before, of_keys.second, kv[2], "");
    check_fit(*this, query_before, of_queries.second, q[2], " queries");
    require(!attributes.own || (of_keys.second == of_queries.second && before == query_before),
            "the queries are the keys' tokens and are ordered otherwise");
    call->order_rows = of_keys.first, call->query_order_rows = of_queries.first;
    call->extents = {q[0], q[1], kv[1], kv[2], q[3], of_keys.second, before,
                     q[2], of_queries.second, query_before};
  }
  // Rows and tokens of an order: one for all heads, or one for each of so many.
  std::pair<int64_t, int64_t> order_of(const Tensor& t, const char* what, int64_t rows,
                                       int64_t or_rows) const {
    const bool vector = t.shape.size() == 1, matrices = t.shape.size() == 3;
    const int64_t found = matrices ? t.shape[0] * t.shape[1] : 1;
    require(vector || (matrices && (found == rows || found == or_rows)),
            std::string(what) + " is " + text(t.shape) +
                "; (tokens) and (batch, heads, tokens) are supported");
    return {found, t.shape.back()};
  }
  void compute(ort::KernelContext* ctx) const override {
    std::vector<Tensor> in;
    for (size_t i = 0; i < kInputs; ++i) in.push_back(input(ctx, i));
    CudaCall call{};
    check_extents(in, &call);
    call.attributes = attributes, call.type = type_code();
    call.mask_batch = in[kKeyMask].shape[0], call.mask_length = in[kKeyMask].shape[1];
    call.query = in[kQuery].data, call.key = in[kKey].data, call.value = in[kValue].data;
    call.budget = in[kBudget].data, call.key_mask = in[kKeyMask].data;
    call.order = in[kOrder].data, call.query_order = in[kQueryOrder].data;
    call.out = output(ctx, in[kQuery].shape);
    check(ort::GetComputeStream::call(api, ctx, &call.stream));
    run(ctx, in[kQuery], [&] { return plan_cuda(call); },
        [&](const CudaPlan& plan, void* workspace) { launch_cuda(call, plan, workspace); });
  }
};

struct OrderKernel final : Kernel {
  int64_t largest_chunk = 0;
  using Kernel::Kernel;

  void compute(ort::KernelContext* ctx) const override {
    std::vector<Tensor> in;
    for (size_t i = 0; i < kOrderInputs; ++i) in.push_back(input(ctx, i));
    const auto& x = in[kTokens].shape;
    require(x.size() == 4, "tokens " + text(x) + " are not (batch, heads, tokens, head_dim)");
    require(in[kBase].shape.size() == 1, "base is " + text(in[kBase].shape) + "; (tokens) is supported");
    const int64_t chunks = in[kChunks].size();
    require(chunks > 0 && x[1] % chunks == 0,
            "chunks " + text(in[kChunks].shape) + " do not go with " + std::to_string(x[1]) + " heads");
    OrderCall call{};
    call.batch = x[0], call.heads = x[1], call.length = x[2], call.dim = x[3];
    call.tokens = in[kBase].shape[0];
    call.text_before = number(*this, in[kOrderTextBefore], "text_before");
    check_fit(*this, call.text_before, call.tokens, call.length, "");
    call.chunk_heads = chunks, call.largest_chunk = largest_chunk, call.type = type_code();
    call.tokens_of = in[kTokens].data, call.base = in[kBase].data, call.chunks = in[kChunks].data;
    call.order = output(ctx, {x[0], x[1], call.tokens});
    check(ort::GetComputeStream::call(api, ctx, &call.stream));
    run(ctx, in[kTokens], [&] { return plan_order(call); },
        [&](const CudaPlan& plan, void* workspace) { launch_order(call, plan, workspace); });
  }
};

ort::Status* guarded(void* kernel, ort::KernelContext* ctx) {
  const Kernel& k = *static_cast<Kernel*>(kernel);
  try {
    k.compute(ctx);
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

ort::Status* create_split(const ort::CustomOp* op, ort::Api* api, const ort::KernelInfo* info,
                          void** out) {
  auto* k = new SplitKernel(api, self(op).type, "freqopt::SplitAttention");
  int64_t own = 1;
  ort::Status* status = ort::GetAttributeFloat::call(api, info, "scale", &k->attributes.scale);
  if (!status) status = ort::GetAttributeFloat::call(api, info, "density", &k->attributes.density);
  if (!status) status = ort::GetAttributeInt::call(api, info, "probes", &k->attributes.probes);
  if (!status) status = ort::GetAttributeInt::call(api, info, "own", &own);
  k->attributes.own = own != 0;
  if (status) {
    delete k;
    return status;
  }
  *out = static_cast<Kernel*>(k);
  return nullptr;
}

ort::Status* create_order(const ort::CustomOp* op, ort::Api* api, const ort::KernelInfo* info,
                          void** out) {
  auto* k = new OrderKernel(api, self(op).type, "freqopt::ContentOrder");
  if (ort::Status* status =
          ort::GetAttributeInt::call(api, info, "largest_chunk", &k->largest_chunk)) {
    delete k;
    return status;
  }
  *out = static_cast<Kernel*>(k);
  return nullptr;
}

ort::Status* infer(const ort::CustomOp* op, ort::ShapeContext* context);

Op make_op(ort::ElementType type) {  // what both operators have in common
  Op op;
  op.type = type;
  op.provider = [](const ort::CustomOp*) { return FREQOPT_PROVIDER; };
  op.output_count = [](const ort::CustomOp*) { return size_t(1); };
  op.input_characteristic = [](const ort::CustomOp*, size_t) { return 0; };
  op.output_characteristic = [](const ort::CustomOp*, size_t) { return 0; };
  op.variadic_input_min = op.variadic_output_min = [](const ort::CustomOp*) { return 1; };
  op.variadic_input_same = op.variadic_output_same = [](const ort::CustomOp*) { return 1; };
  op.compute_v2 = guarded;
  op.destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.start_version = op.end_version = [](const ort::CustomOp*) { return kOpVersion; };
  return op;
}

Op split_op(ort::ElementType type) {
  Op op = make_op(type);
  op.name = [](const ort::CustomOp*) { return "SplitAttention"; };
  op.input_count = [](const ort::CustomOp*) { return size_t(kInputs); };
  op.input_type = [](const ort::CustomOp* o, size_t i) {
    return i <= kValue    ? self(o).type
           : i == kBudget ? ort::kFloat
           : i == kKeyMask ? ort::kBool
                           : ort::kInt64;
  };
  op.output_type = [](const ort::CustomOp* o, size_t) { return self(o).type; };
  op.input_memory = [](const ort::CustomOp*, size_t i) {
    return i == kTextBefore || i == kQueryTextBefore ? ort::kCpuInput : ort::kDefault;
  };
  op.create_kernel_v2 = create_split;
  op.infer_shape = infer;
  return op;
}

Op order_op(ort::ElementType type) {
  Op op = make_op(type);
  op.name = [](const ort::CustomOp*) { return "ContentOrder"; };
  op.input_count = [](const ort::CustomOp*) { return size_t(kOrderInputs); };
  op.input_type = [](const ort::CustomOp* o, size_t i) {
    return i == kTokens ? self(o).type : i == kChunks ? ort::kInt32 : ort::kInt64;
  };
  op.output_type = [](const ort::CustomOp*, size_t) { return ort::kInt64; };
  op.input_memory = [](const ort::CustomOp*, size_t i) {
    return i == kOrderTextBefore ? ort::kCpuInput : ort::kDefault;
  };
  op.create_kernel_v2 = create_order;
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
      ops.push_back(split_op(type));
      ops.push_back(order_op(type));
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
