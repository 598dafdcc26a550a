// WIDE_VECTORS before a function of plain loops: compiled for AVX2 too, and chosen when the library is loaded. The
// results are the same, since FMA instructions are not among it.
#pragma once

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define WIDE_VECTORS __attribute__((target_clones("avx2", "default")))
#else
#define WIDE_VECTORS
#endif

// FLAT beside it: all calls inlined, so that they are compiled for wide vectors, too.
#if defined(__GNUC__) && !defined(__clang__)
#define FLAT __attribute__((flatten))
#else
#define FLAT
#endif
