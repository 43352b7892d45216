// TensorRT plugins of SplitAttention and ContentOrder: IPluginV3s over the launches of split_cuda.cc
// and order_cuda.cc.
//
// One plugin runs the whole split, with its own workspace, so it is bound neither to one kernel per
// node nor to 48 KiB of shared memory; another makes the orders by content that it reads. Built
// against TensorRT's own headers, 10.0 or newer; it links to nothing of TensorRT.
#include <NvInferRuntime.h>

#include <cstdio>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

#include "order_cuda.h"
#include "split_cuda.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace freqopt {
namespace {

namespace trt = nvinfer1;
constexpr char kVersion[] = "1", kNamespace[] = "";

// The table of kernels numbers types 0 float, 1 half, 2 bfloat16; -1: there are no kernels.
int type_code(trt::DataType type) {
  return type == trt::DataType::kFLOAT  ? 0
         : type == trt::DataType::kHALF ? 1
         : type == trt::DataType::kBF16 ? 2
                                        : -1;
}

int report(const char* name, const std::exception& failed) {
  std::fprintf(stderr, "freqopt %s: %s\n", name, failed.what());
  return 1;
}

struct Dims {  // of a call's inputs
  std::vector<trt::Dims> inputs;
  trt::DataType type;  // of the first
};

struct Split {  // what SplitAttention is: its attributes, its inputs, its launches
  static constexpr char kName[] = "SplitAttention";
  enum Input { kQuery, kKey, kValue, kBudget, kOrder, kQueryOrder, kInputs };
  float scale = 0, density = 0;
  int32_t probes = 0, own = 1, text_before = 0, query_text_before = 0;

  std::vector<trt::PluginField> fields() {
    constexpr auto kInt = trt::PluginFieldType::kINT32, kFloat = trt::PluginFieldType::kFLOAT32;
    return {{"scale", &scale, kFloat, 1},
            {"density", &density, kFloat, 1},
            {"probes", &probes, kInt, 1},
            {"own", &own, kInt, 1},
            {"text_before", &text_before, kInt, 1},
            {"query_text_before", &query_text_before, kInt, 1}};
  }
  static trt::DataType output_type(const trt::DataType* inputs) { return inputs[kQuery]; }
  static trt::DimsExprs output_shape(const trt::DimsExprs* inputs) { return inputs[kQuery]; }
  static bool takes(int32_t at, trt::DataType type, trt::DataType of_first) {
    if (at == kBudget) return type == trt::DataType::kFLOAT;
    if (at == kOrder || at == kQueryOrder) return type == trt::DataType::kINT64;
    return at == kQuery ? type_code(type) >= 0 : type == of_first;
  }

  CudaCall call_of(const Dims& given) const {
    const auto &q = given.inputs[kQuery], &k = given.inputs[kKey];
    const auto &order = given.inputs[kOrder], &query_order = given.inputs[kQueryOrder];
    const auto rows = [](const trt::Dims& d) { return d.nbDims == 3 ? d.d[0] * d.d[1] : 1; };
    CudaCall call{};
    call.extents = {q.d[0], q.d[1], k.d[1], k.d[2], q.d[3], order.d[order.nbDims - 1], text_before,
                    q.d[2], query_order.d[query_order.nbDims - 1], query_text_before};
    call.order_rows = rows(order), call.query_order_rows = rows(query_order);
    call.attributes = {scale, density, probes, own != 0};
    call.type = type_code(given.type);
    call.mask_batch = call.mask_length = 1;
    const Extents& e = call.extents;
    const int64_t pairs = e.batch * e.heads, kv = e.batch * e.kv_heads;
    if (e.kv_heads == 0 || e.heads % e.kv_heads || e.tokens + e.text_before > e.length ||
        e.queries + e.query_before > e.query_length ||
        (call.order_rows != 1 && call.order_rows != kv) ||
        (call.query_order_rows != 1 && call.query_order_rows != kv &&
         call.query_order_rows != pairs)) {
      throw std::runtime_error("query, key and their orders do not fit together");
    }
    return call;
  }
  CudaPlan plan(const Dims& given) const { return plan_cuda(call_of(given)); }
  void run(const Dims& given, const void* const* inputs, void* output, void* workspace,
           cudaStream_t stream) const {
    CudaCall call = call_of(given);
    auto input = [inputs](Input i) { return const_cast<void*>(inputs[i]); };
    call.query = input(kQuery), call.key = input(kKey), call.value = input(kValue);
    call.budget = input(kBudget), call.order = input(kOrder), call.query_order = input(kQueryOrder);
    call.out = output, call.stream = stream;
    launch_cuda(call, plan_cuda(call), workspace);
  }
};

struct Order {  // the same of ContentOrder
  static constexpr char kName[] = "ContentOrder";
  enum Input { kTokens, kBase, kChunks, kInputs };
  int32_t largest_chunk = 0, text_before = 0;

  std::vector<trt::PluginField> fields() {
    constexpr auto kInt = trt::PluginFieldType::kINT32;
    return {{"largest_chunk", &largest_chunk, kInt, 1}, {"text_before", &text_before, kInt, 1}};
  }
  static trt::DataType output_type(const trt::DataType*) { return trt::DataType::kINT64; }
  static trt::DimsExprs output_shape(const trt::DimsExprs* inputs) {
    trt::DimsExprs shape = inputs[kTokens];
    shape.nbDims = 3;
    shape.d[2] = inputs[kBase].d[0];
    return shape;
  }
  static bool takes(int32_t at, trt::DataType type, trt::DataType) {
    if (at == kTokens) return type_code(type) >= 0;
    return type == (at == kChunks ? trt::DataType::kINT32 : trt::DataType::kINT64);
  }

  OrderCall call_of(const Dims& given) const {
    const auto &x = given.inputs[kTokens], &base = given.inputs[kBase];
    OrderCall call{};
    call.batch = x.d[0], call.heads = x.d[1], call.length = x.d[2], call.dim = x.d[3];
    call.tokens = base.d[0], call.text_before = text_before;
    call.chunk_heads = given.inputs[kChunks].d[0], call.largest_chunk = largest_chunk;
    call.type = type_code(given.type);
    if (call.chunk_heads == 0 || call.heads % call.chunk_heads ||
        call.tokens + call.text_before > call.length) {
      throw std::runtime_error("tokens, base and chunks do not fit together");
    }
    return call;
  }
  CudaPlan plan(const Dims& given) const { return plan_order(call_of(given)); }
  void run(const Dims& given, const void* const* inputs, void* output, void* workspace,
           cudaStream_t stream) const {
    OrderCall call = call_of(given);
    call.tokens_of = const_cast<void*>(inputs[kTokens]);
    call.base = const_cast<void*>(inputs[kBase]), call.chunks = const_cast<void*>(inputs[kChunks]);
    call.order = output, call.stream = stream;
    launch_order(call, plan_order(call), workspace);
  }
};

template <typename Site>
class Plugin final : public trt::IPluginV3,
                     public trt::IPluginV3OneCore,
                     public trt::IPluginV3OneBuild,
                     public trt::IPluginV3OneRuntime {
 public:
  explicit Plugin(const Site& site) : site_(site) {}

  trt::IPluginCapability* getCapabilityInterface(trt::PluginCapabilityType type) noexcept override {
    switch (type) {
      case trt::PluginCapabilityType::kCORE: return static_cast<trt::IPluginV3OneCore*>(this);
      case trt::PluginCapabilityType::kBUILD: return static_cast<trt::IPluginV3OneBuild*>(this);
      case trt::PluginCapabilityType::kRUNTIME: return static_cast<trt::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
  }
  trt::IPluginV3* clone() noexcept override { return new Plugin(site_); }

  const char* getPluginName() const noexcept override { return Site::kName; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }

  int32_t getNbOutputs() const noexcept override { return 1; }
  int32_t getOutputDataTypes(trt::DataType* outputs, int32_t, const trt::DataType* inputs,
                             int32_t) const noexcept override {
    outputs[0] = Site::output_type(inputs);
    return 0;
  }
  int32_t getOutputShapes(const trt::DimsExprs* inputs, int32_t, const trt::DimsExprs*, int32_t,
                          trt::DimsExprs* outputs, int32_t, trt::IExprBuilder&) noexcept override {
    outputs[0] = Site::output_shape(inputs);
    return 0;
  }
  bool supportsFormatCombination(int32_t at, const trt::DynamicPluginTensorDesc* tensors,
                                 int32_t inputs, int32_t) noexcept override {
    const trt::PluginTensorDesc& tensor = tensors[at].desc;
    if (inputs != Site::kInputs || tensor.format != trt::TensorFormat::kLINEAR) return false;
    const trt::DataType first = tensors[0].desc.type;
    if (at == Site::kInputs) return tensor.type == Site::output_type(&first);
    return Site::takes(at, tensor.type, first);
  }
  int32_t configurePlugin(const trt::DynamicPluginTensorDesc*, int32_t,
                          const trt::DynamicPluginTensorDesc*, int32_t) noexcept override {
    return 0;
  }
  size_t getWorkspaceSize(const trt::DynamicPluginTensorDesc* in, int32_t,
                          const trt::DynamicPluginTensorDesc*, int32_t) const noexcept override {
    try {
      Dims given{{}, in[0].desc.type};
      for (int i = 0; i < Site::kInputs; ++i) given.inputs.push_back(in[i].max);
      return site_.plan(given).workspace_bytes;
    } catch (const std::exception& failed) {
      report(Site::kName, failed);  // enqueue fails with the same words, and with a code
      return 0;
    }
  }

  int32_t onShapeChange(const trt::PluginTensorDesc*, int32_t, const trt::PluginTensorDesc*,
                        int32_t) noexcept override {
    return 0;
  }
  int32_t enqueue(const trt::PluginTensorDesc* in, const trt::PluginTensorDesc*,
                  const void* const* inputs, void* const* outputs, void* workspace,
                  cudaStream_t stream) noexcept override {
    try {
      Dims given{{}, in[0].type};
      for (int i = 0; i < Site::kInputs; ++i) given.inputs.push_back(in[i].dims);
      site_.run(given, inputs, outputs[0], workspace, stream);
      return 0;
    } catch (const std::exception& failed) {
      return report(Site::kName, failed);
    }
  }
  trt::IPluginV3* attachToContext(trt::IPluginResourceContext*) noexcept override { return clone(); }

  const trt::PluginFieldCollection* getFieldsToSerialize() noexcept override {
    fields_ = site_.fields();
    collection_ = {int32_t(fields_.size()), fields_.data()};
    return &collection_;
  }

 private:
  Site site_;
  std::vector<trt::PluginField> fields_;
  trt::PluginFieldCollection collection_;
};

template <typename Site>
class Creator final : public trt::IPluginCreatorV3One {
 public:
  const char* getPluginName() const noexcept override { return Site::kName; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }
  const trt::PluginFieldCollection* getFieldNames() noexcept override {
    static Plugin<Site> example{Site{}};
    return example.getFieldsToSerialize();
  }
  trt::IPluginV3* createPlugin(const char*, const trt::PluginFieldCollection* given,
                               trt::TensorRTPhase) noexcept override {
    try {
      return new Plugin<Site>(read(*given));
    } catch (const std::exception& failed) {
      report(Site::kName, failed);
      return nullptr;
    }
  }

 private:
  static Site read(const trt::PluginFieldCollection& given) {
    Site site;
    for (const trt::PluginField& wanted : site.fields()) fill(given, wanted);
    return site;
  }
  // Every attribute is four bytes.
  static void fill(const trt::PluginFieldCollection& given, const trt::PluginField& wanted) {
    for (int32_t i = 0; i < given.nbFields; ++i) {
      const trt::PluginField& field = given.fields[i];
      if (std::strcmp(field.name, wanted.name) == 0 && field.type == wanted.type &&
          field.length == 1) {
        std::memcpy(const_cast<void*>(wanted.data), field.data, 4);
        return;
      }
    }
    throw std::runtime_error(std::string("the attribute ") + wanted.name +
                             " is missing or has another type");
  }
};

}  // namespace
}  // namespace freqopt

// What IPluginRegistry::loadLibrary looks for.
EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  static freqopt::Creator<freqopt::Split> split;
  static freqopt::Creator<freqopt::Order> order;
  static nvinfer1::IPluginCreatorInterface* const creators[] = {&split, &order};
  count = 2;
  return creators;
}

EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder*) {}  // errors go to standard error
