// TensorRT plugin of SplitAttention: an IPluginV3 over the launches of split_cuda.cc.
//
// One plugin runs the whole split, with its own workspace, so it is bound neither to one kernel per
// node nor to 48 KiB of shared memory. Inputs: query, key, value, budget, order. Built against
// TensorRT's own headers, 10.0 or newer; it links to nothing of TensorRT.
#include <NvInferRuntime.h>

#include <array>
#include <cstdio>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <string>

#include "split_cuda.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace freqopt {
namespace {

namespace trt = nvinfer1;
enum Input { kQuery, kKey, kValue, kBudget, kOrder, kInputs };
constexpr char kName[] = "SplitAttention", kVersion[] = "1", kNamespace[] = "";

struct Settings {
  float scale = 0, density = 0;
  int32_t probes = 0, text_before = 0;
};

// The table of kernels numbers types 0 float, 1 half, 2 bfloat16; -1: there are no kernels.
int type_code(trt::DataType type) {
  return type == trt::DataType::kFLOAT  ? 0
         : type == trt::DataType::kHALF ? 1
         : type == trt::DataType::kBF16 ? 2
                                        : -1;
}

CudaCall call_of(const Settings& settings, const trt::Dims& query, const trt::Dims& key,
                 const trt::Dims& order, trt::DataType type) {
  CudaCall call{};
  call.extents = {query.d[0], query.d[1], key.d[1], query.d[2],
                  query.d[3], order.d[0], settings.text_before};
  call.attributes = {settings.scale, settings.density, settings.probes};
  call.type = type_code(type);
  call.mask_batch = call.mask_length = 1;
  const Extents& e = call.extents;
  if (e.kv_heads == 0 || e.heads % e.kv_heads || e.tokens + e.text_before > e.length) {
    throw std::runtime_error("query, key and order do not fit together");
  }
  return call;
}

int report(const std::exception& failed) {
  std::fprintf(stderr, "freqopt SplitAttention: %s\n", failed.what());
  return 1;
}

class Plugin final : public trt::IPluginV3,
                     public trt::IPluginV3OneCore,
                     public trt::IPluginV3OneBuild,
                     public trt::IPluginV3OneRuntime {
 public:
  explicit Plugin(const Settings& settings) : settings_(settings) {}

  trt::IPluginCapability* getCapabilityInterface(trt::PluginCapabilityType type) noexcept override {
    switch (type) {
      case trt::PluginCapabilityType::kCORE: return static_cast<trt::IPluginV3OneCore*>(this);
      case trt::PluginCapabilityType::kBUILD: return static_cast<trt::IPluginV3OneBuild*>(this);
      case trt::PluginCapabilityType::kRUNTIME: return static_cast<trt::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
  }
  trt::IPluginV3* clone() noexcept override { return new Plugin(settings_); }

  const char* getPluginName() const noexcept override { return kName; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }

  int32_t getNbOutputs() const noexcept override { return 1; }
  int32_t getOutputDataTypes(trt::DataType* outputs, int32_t, const trt::DataType* inputs,
                             int32_t) const noexcept override {
    outputs[0] = inputs[kQuery];
    return 0;
  }
  int32_t getOutputShapes(const trt::DimsExprs* inputs, int32_t, const trt::DimsExprs*, int32_t,
                          trt::DimsExprs* outputs, int32_t, trt::IExprBuilder&) noexcept override {
    outputs[0] = inputs[kQuery];
    return 0;
  }
  bool supportsFormatCombination(int32_t at, const trt::DynamicPluginTensorDesc* tensors,
                                 int32_t inputs, int32_t) noexcept override {
    const trt::PluginTensorDesc& tensor = tensors[at].desc;
    if (inputs != kInputs || tensor.format != trt::TensorFormat::kLINEAR) return false;
    if (at == kBudget) return tensor.type == trt::DataType::kFLOAT;
    if (at == kOrder) return tensor.type == trt::DataType::kINT64;
    return at == kQuery ? type_code(tensor.type) >= 0 : tensor.type == tensors[kQuery].desc.type;
  }
  int32_t configurePlugin(const trt::DynamicPluginTensorDesc*, int32_t,
                          const trt::DynamicPluginTensorDesc*, int32_t) noexcept override {
    return 0;
  }
  size_t getWorkspaceSize(const trt::DynamicPluginTensorDesc* in, int32_t,
                          const trt::DynamicPluginTensorDesc*, int32_t) const noexcept override {
    try {
      return plan_cuda(call_of(settings_, in[kQuery].max, in[kKey].max, in[kOrder].max,
                               in[kQuery].desc.type)).workspace_bytes;
    } catch (const std::exception& failed) {
      report(failed);  // enqueue fails with the same words, and with a code
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
      CudaCall call = call_of(settings_, in[kQuery].dims, in[kKey].dims, in[kOrder].dims,
                              in[kQuery].type);
      auto input = [inputs](Input i) { return const_cast<void*>(inputs[i]); };
      call.query = input(kQuery), call.key = input(kKey), call.value = input(kValue);
      call.budget = input(kBudget), call.order = input(kOrder);
      call.out = outputs[0], call.stream = stream;
      launch_cuda(call, plan_cuda(call), workspace);
      return 0;
    } catch (const std::exception& failed) {
      return report(failed);
    }
  }
  trt::IPluginV3* attachToContext(trt::IPluginResourceContext*) noexcept override { return clone(); }

  const trt::PluginFieldCollection* getFieldsToSerialize() noexcept override {
    constexpr auto kInt = trt::PluginFieldType::kINT32, kFloat = trt::PluginFieldType::kFLOAT32;
    fields_ = {{{"scale", &settings_.scale, kFloat, 1},
                {"density", &settings_.density, kFloat, 1},
                {"probes", &settings_.probes, kInt, 1},
                {"text_before", &settings_.text_before, kInt, 1}}};
    collection_ = {int32_t(fields_.size()), fields_.data()};
    return &collection_;
  }

 private:
  Settings settings_;
  std::array<trt::PluginField, 4> fields_;
  trt::PluginFieldCollection collection_;
};

class Creator final : public trt::IPluginCreatorV3One {
 public:
  const char* getPluginName() const noexcept override { return kName; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }
  const trt::PluginFieldCollection* getFieldNames() noexcept override {
    static Plugin example{Settings{}};
    return example.getFieldsToSerialize();
  }
  trt::IPluginV3* createPlugin(const char*, const trt::PluginFieldCollection* given,
                               trt::TensorRTPhase) noexcept override {
    try {
      return new Plugin(read(*given));
    } catch (const std::exception& failed) {
      report(failed);
      return nullptr;
    }
  }

 private:
  static Settings read(const trt::PluginFieldCollection& given) {
    Settings settings;
    auto fill = [&given](const char* name, auto& value, trt::PluginFieldType type) {
      for (int32_t i = 0; i < given.nbFields; ++i) {
        const trt::PluginField& field = given.fields[i];
        if (std::strcmp(field.name, name) == 0 && field.type == type && field.length == 1) {
          std::memcpy(&value, field.data, sizeof value);
          return;
        }
      }
      throw std::runtime_error(std::string("the attribute ") + name + " is missing or has another type");
    };
    fill("scale", settings.scale, trt::PluginFieldType::kFLOAT32);
    fill("density", settings.density, trt::PluginFieldType::kFLOAT32);
    fill("probes", settings.probes, trt::PluginFieldType::kINT32);
    fill("text_before", settings.text_before, trt::PluginFieldType::kINT32);
    return settings;
  }
};

}  // namespace
}  // namespace freqopt

// What IPluginRegistry::loadLibrary looks for.
EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  static freqopt::Creator creator;
  static nvinfer1::IPluginCreatorInterface* const creators[] = {&creator};
  count = 1;
  return creators;
}

EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder*) {}  // errors go to standard error
