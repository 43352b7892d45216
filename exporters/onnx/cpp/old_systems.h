// Included before every source: keeps the built library loadable on systems older than the one it
// was built on, down to those that onnxruntime's own wheels ask for (glibc 2.28, GCC 8's libstdc++).
#pragma once
#ifndef __ASSEMBLER__  // the table of kernels is one
#include <new>

#if defined(__GLIBC__) && defined(__x86_64__)
// Newer glibc moved or renewed these; the versions of 2002 are still in every one.
__asm__(".symver dlopen,dlopen@GLIBC_2.2.5");
__asm__(".symver dlsym,dlsym@GLIBC_2.2.5");
__asm__(".symver dlerror,dlerror@GLIBC_2.2.5");
#endif

#ifdef __GLIBCXX__
namespace std {
// GCC 11 and newer call it from every vector; libstdc++ has it since then.
__attribute__((weak, visibility("hidden"))) void __throw_bad_array_new_length() {
  throw bad_array_new_length();
}
}  // namespace std
#endif
#endif
