// Asks a TensorRT plugin what it is: its name and fields, what it makes of a node's attributes, and
// which types of inputs it takes. Arguments: the plugin's name, the types of its inputs and output as
// letters (h half, f float, l int64, i int32), and float:NAME=VALUE or int:NAME=VALUE, a node's
// attributes.
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "split_tensorrt.cc"

namespace freqopt {
const Cubin kCubins[] = {{}};
const int kCubinCount = 0;
}  // namespace freqopt

namespace trt = nvinfer1;

int main(int argc, char** argv) {
  if (argc < 3) return 2;
  int32_t count = 0;
  auto* const* creators = getCreators(count);
  trt::IPluginCreatorV3One* creator = nullptr;
  for (int i = 0; i < count; ++i) {
    auto* each = static_cast<trt::IPluginCreatorV3One*>(creators[i]);
    if (std::string(each->getPluginName()) == argv[1]) creator = each;
  }
  if (!creator) return 4;
  std::printf("creators %d\nname %s %s\n", count, creator->getPluginName(), creator->getPluginVersion());
  const trt::PluginFieldCollection names = *creator->getFieldNames();
  for (int i = 0; i < names.nbFields; ++i) std::printf("field %s\n", names.fields[i].name);

  std::vector<std::string> held(argc);
  std::vector<float> floats(argc);
  std::vector<int32_t> ints(argc);
  std::vector<trt::PluginField> fields;
  for (int i = 3; i < argc; ++i) {
    const std::string given = argv[i];
    const size_t colon = given.find(':'), equals = given.find('=');
    const bool is_float = given.substr(0, colon) == "float";
    held[i] = given.substr(colon + 1, equals - colon - 1);
    floats[i] = std::strtof(given.c_str() + equals + 1, nullptr);
    ints[i] = std::atoi(given.c_str() + equals + 1);
    if (is_float) {
      fields.push_back({held[i].c_str(), &floats[i], trt::PluginFieldType::kFLOAT32, 1});
    } else {
      fields.push_back({held[i].c_str(), &ints[i], trt::PluginFieldType::kINT32, 1});
    }
  }
  const trt::PluginFieldCollection attributes{int32_t(fields.size()), fields.data()};
  trt::IPluginV3* plugin = creator->createPlugin("", &attributes, trt::TensorRTPhase::kBUILD);
  if (!plugin) return 3;
  auto* runtime = static_cast<trt::IPluginV3OneRuntime*>(
      plugin->getCapabilityInterface(trt::PluginCapabilityType::kRUNTIME));
  const trt::PluginFieldCollection kept = *runtime->getFieldsToSerialize();
  for (int i = 0; i < kept.nbFields; ++i) {
    const trt::PluginField& field = kept.fields[i];
    if (field.type == trt::PluginFieldType::kFLOAT32) {
      std::printf("kept %s %.9g\n", field.name, double(*static_cast<const float*>(field.data)));
    } else {
      std::printf("kept %s %d\n", field.name, *static_cast<const int32_t*>(field.data));
    }
  }
  auto* build = static_cast<trt::IPluginV3OneBuild*>(
      plugin->getCapabilityInterface(trt::PluginCapabilityType::kBUILD));
  const std::string letters = argv[2];
  std::vector<trt::DynamicPluginTensorDesc> tensors(letters.size());
  for (size_t i = 0; i < letters.size(); ++i) {
    tensors[i].desc.type = letters[i] == 'h'   ? trt::DataType::kHALF
                           : letters[i] == 'f' ? trt::DataType::kFLOAT
                           : letters[i] == 'l' ? trt::DataType::kINT64
                                               : trt::DataType::kINT32;
  }
  const int inputs = int(letters.size()) - 1;
  bool taken = true;
  for (int i = 0; i <= inputs; ++i) {
    taken = taken && build->supportsFormatCombination(i, tensors.data(), inputs, 1);
  }
  const bool fewer = build->supportsFormatCombination(0, tensors.data(), inputs - 1, 1);
  tensors[1].desc.type = trt::DataType::kFLOAT;
  const bool mixed = build->supportsFormatCombination(1, tensors.data(), inputs, 1);
  std::printf("taken %d fewer %d mixed %d\n", taken, fewer, mixed);
  delete plugin;
  return 0;
}
