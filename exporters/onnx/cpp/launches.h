// Finds kernels in the generated table and launches them, their arguments and grids given by name.
//
// Nothing here waits for the device: every launch goes to the caller's stream.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>

#include "cuda_driver.h"

namespace freqopt {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Channels of the kernels' tiles, as freqopt.kernels.tiles.padded_dim.
inline int64_t padded_dim(int64_t dim) {
  int64_t padded = 16;
  while (padded < dim) padded *= 2;
  return padded;
}

struct Cubin {  // one row of the generated table of kernels
  // arguments: names of what is passed, comma-separated, in launch order. A tensor map is five of them: x.map, then
  // its extents and strides in elements, which Triton passes once more. grid: "pairs,tiles/8", an
  // argument for each axis, and the part of it that one program has.
  const char *kernel, *symbol, *arguments, *grid;
  int capability, dtype, head_dim, masked;
  int warps, shared;
  const unsigned char* image;
};
extern const Cubin kCubins[];
extern const int kCubinCount;

// Rows of launch_table.h, which is written from the same declarations as PyTorch's launches read.
struct Derived {  // an extent that is another in parts, the last of them ragged
  const char *name, *of;
  int64_t part;
};
struct Buffer {  // what launches hand on; bytes: of an element, 0 for the attended tensors' own
  const char* name;
  int64_t bytes, times;    // elements: the batch, times this,
  const char* extents[5];  // times these, up to a null
};
struct Step {  // a launch of a split
  const char *kernel, *when;  // when: which calls have it, empty for all
  bool of_tokens;             // whether queries of other tokens have a kernel of their own
};

enum Masked : int { kUnmasked, kMasked, kEither };

struct Launcher {  // where a call's kernels run, and what they are compiled for
  Device device;
  int type;  // 0 float, 1 half, 2 bfloat16
  int64_t head_dim;
  Masked masked;  // either: of kernels that read no mask
  void* stream;
};

struct CudaPlan {  // where each intermediate tensor lies in the workspace
  std::map<std::string, size_t> offset;
  size_t workspace_bytes = 0;
  void add(const char* name, int64_t elements, int64_t bytes) {
    offset[name] = workspace_bytes;
    workspace_bytes += size_t(ceil_div((elements > 0 ? elements : 1) * bytes, 256)) * 256;
  }
};

struct Argument {  // a tensor map, or eight bytes that hold a pointer, an integer or a float
  uint64_t bits = 0;
  const TensorMap* map = nullptr;
  Argument() = default;
  Argument(const TensorMap* m) : map(m) {}
  Argument(void* p) { std::memcpy(&bits, &p, sizeof p); }
  Argument(int64_t v) {
    if (v > INT32_MAX) throw std::runtime_error("an extent of the tensors exceeds 2^31");
    const int32_t small = int32_t(v);
    std::memcpy(&bits, &small, 4);
  }
  Argument(float v) { std::memcpy(&bits, &v, 4); }
  void* pointer() const {
    void* p = nullptr;
    std::memcpy(&p, &bits, sizeof p);
    return p;
  }
  int64_t number() const { return int32_t(bits); }
  void* address() { return map ? const_cast<TensorMap*>(map) : static_cast<void*>(&bits); }
};
using Arguments = std::map<std::string, Argument>;

// The plan's tensors by name, in a workspace.
Arguments tensors_of(const CudaPlan& plan, void* workspace);

// The best entry for a kernel, or null: code runs on later chips of its own generation.
const Cubin* find(const Launcher& on, const std::string& kernel);

// The same; throws with a message for the user where there is none.
const Cubin& choose(const Launcher& on, const std::string& kernel);

// own: arguments that differ from, or are not among, those that are shared. The grid's are found
// among both.
void launch(const Launcher& on, const std::string& kernel, const Arguments& shared,
            const Arguments& own);

void fill(const Launcher& on, const Argument& to, unsigned word, int64_t words);

}  // namespace freqopt
