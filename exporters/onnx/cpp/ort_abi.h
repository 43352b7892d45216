// The part of onnxruntime's C interface that this library uses, written by hand.
//
// The interface is a table of function pointers that only ever grows, so a function is named by its
// slot. Tests call every slot listed here in the installed onnxruntime.
#pragma once
#include <cstddef>
#include <cstdint>

namespace ort {

constexpr uint32_t kApiVersion = 17;  // shape inference came with onnxruntime 1.17

struct Status;
struct KernelInfo;
struct KernelContext;
struct ShapeContext;
struct Value;
struct TensorInfo;
struct SessionOptions;
struct Domain;
struct MemoryInfo;
struct Allocator;

using Api = void* const;  // the table

struct ApiBase {
  Api* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

enum ElementType : int {
  kUndefined = 0, kFloat = 1, kInt32 = 6, kInt64 = 7, kBool = 9, kHalf = 10, kBfloat16 = 16
};
enum ErrorCode : int { kFail = 1, kInvalidArgument = 2, kNotImplemented = 9 };
enum MemoryType : int { kCpuInput = -2, kDefault = 0 };

template <int Slot, typename Signature>
struct Function;

template <int Slot, typename R, typename... A>
struct Function<Slot, R(A...)> {
  static R call(Api* api, A... args) { return reinterpret_cast<R (*)(A...)>(api[Slot])(args...); }
};

using CreateStatus = Function<0, Status*(ErrorCode, const char*)>;
using CreateCustomOpDomain = Function<26, Status*(const char*, Domain**)>;
using CustomOpDomainAdd = Function<27, Status*(Domain*, const void*)>;
using AddCustomOpDomain = Function<28, Status*(SessionOptions*, Domain*)>;
using GetTensorMutableData = Function<51, Status*(Value*, void**)>;
using GetElementType = Function<60, Status*(const TensorInfo*, ElementType*)>;
using GetDimensionsCount = Function<61, Status*(const TensorInfo*, size_t*)>;
using GetDimensions = Function<62, Status*(const TensorInfo*, int64_t*, size_t)>;
using GetTensorTypeAndShape = Function<65, Status*(const Value*, TensorInfo**)>;
using AllocatorAlloc = Function<75, Status*(Allocator*, size_t, void**)>;
using AllocatorFree = Function<76, Status*(Allocator*, void*)>;
using GetAttributeFloat = Function<85, Status*(const KernelInfo*, const char*, float*)>;
using GetAttributeInt = Function<86, Status*(const KernelInfo*, const char*, int64_t*)>;
using GetInputCount = Function<88, Status*(const KernelContext*, size_t*)>;
using GetInput = Function<90, Status*(const KernelContext*, size_t, const Value**)>;
using GetOutput = Function<91, Status*(KernelContext*, size_t, const int64_t*, size_t, Value**)>;
using ReleaseTensorInfo = Function<99, void(TensorInfo*)>;
using GetComputeStream = Function<193, Status*(const KernelContext*, void**)>;
using GetTensorMemoryInfo = Function<194, Status*(const Value*, const MemoryInfo**)>;
using GetAllocator = Function<253, Status*(const KernelContext*, const MemoryInfo*, Allocator**)>;
using ReleaseAllocator = Function<132, void(Allocator*)>;
using InferInputShape = Function<268, Status*(const ShapeContext*, size_t, TensorInfo**)>;
using InferOutputShape = Function<270, Status*(const ShapeContext*, size_t, const TensorInfo*)>;

// What onnxruntime asks of a custom operator: a table of callbacks, also append-only.
struct CustomOp {
  uint32_t version = kApiVersion;
  void* (*create_kernel)(const CustomOp*, Api*, const KernelInfo*) = nullptr;
  const char* (*name)(const CustomOp*) = nullptr;
  const char* (*provider)(const CustomOp*) = nullptr;
  ElementType (*input_type)(const CustomOp*, size_t) = nullptr;
  size_t (*input_count)(const CustomOp*) = nullptr;
  ElementType (*output_type)(const CustomOp*, size_t) = nullptr;
  size_t (*output_count)(const CustomOp*) = nullptr;
  void (*compute)(void*, KernelContext*) = nullptr;
  void (*destroy)(void*) = nullptr;
  int (*input_characteristic)(const CustomOp*, size_t) = nullptr;
  int (*output_characteristic)(const CustomOp*, size_t) = nullptr;
  MemoryType (*input_memory)(const CustomOp*, size_t) = nullptr;
  int (*variadic_input_min)(const CustomOp*) = nullptr;
  int (*variadic_input_same)(const CustomOp*) = nullptr;
  int (*variadic_output_min)(const CustomOp*) = nullptr;
  int (*variadic_output_same)(const CustomOp*) = nullptr;
  Status* (*create_kernel_v2)(const CustomOp*, Api*, const KernelInfo*, void**) = nullptr;
  Status* (*compute_v2)(void*, KernelContext*) = nullptr;
  Status* (*infer_shape)(const CustomOp*, ShapeContext*) = nullptr;
  int (*start_version)(const CustomOp*) = nullptr;
  int (*end_version)(const CustomOp*) = nullptr;
  size_t (*may_inplace)(int**, int**) = nullptr;
  void (*release_inplace)(int*, int*) = nullptr;
  size_t (*alias_map)(int**, int**) = nullptr;
  void (*release_alias)(int*, int*) = nullptr;
};

}  // namespace ort
