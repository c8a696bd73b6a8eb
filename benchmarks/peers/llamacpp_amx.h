// For building llama.cpp beside libraries that use AMX too; given to the compiler by -include.
//
// llama.cpp 0.5.0 (ggml 0.25.3) configures the tiles of a thread once and never again
// (ggml_tile_config_init, ggml-cpu/amx/mmq.cpp): when another library has configured them since, it
// computes with that one's tiles, or dies. GCC before 13.2 moreover believes that `ldtilecfg` reads
// 8 bytes and drops the other 56 of the configuration, which crashes the first product.
//
// Here the instruction reads all 64, and the function that loads them returns before it notes that
// it is done: so they are loaded in every product, which takes some nanoseconds.
#pragma once
#if defined(__x86_64__) && defined(__AMX_TILE__)
#include <immintrin.h>
#define _tile_loadconfig(config)                                           \
  do {                                                                     \
    __asm__ volatile("ldtilecfg %0" ::"m"(*(const char (*)[64])(config))); \
    return;                                                                \
  } while (0)
#endif
