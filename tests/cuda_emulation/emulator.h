// What a CUDA kernel is run by where there is no GPU: every CUDA thread is a fiber, which runs
// until it waits for others, so that the schedule is ours to choose. Kernels see this file's
// threads and functions through cuda_language.h and emulated_device.h.
//
// The environment, read at every launch, chooses the schedule; a kernel must be right
// under all:
//
//   CONVEXT_EMULATOR_ORDER    0 (usual): blocks, warps and lanes in order; 1: in reverse; 2 and
//   more:
//                             shuffled, by that seed.
//   CONVEXT_EMULATOR_ASYNC    late (usual): asynchronous copies and products happen when they are
//                             waited for; early: when they are issued.
//   CONVEXT_EMULATOR_THREADS  how many OS threads share the blocks; usually one for each CPU.
//
// What is wrong ends the process with one line on stderr: what, which block and thread, file and
// line. Three builds (tests/emulated_cuda.py) find three kinds of mistakes:
//
//   plain    Barriers and warp operations that not all reach, addresses that are not aligned,
//   shared
//            memory read before it was written (it is full of NaN).
//   address  -fsanitize=address,undefined: addresses out of bounds, of shared memory too.
//   race     -fsanitize=thread, with races.cpp in the place of that sanitizer's library: accesses,
//            of one block or of two, that no barrier orders.
//
// Not seen by any: missing proxy fences, bank conflicts, the time that a kernel takes.
#pragma once

#include <vector_functions.h>
#include <vector_types.h>

#include <cstddef>
#include <cstdint>
#include <source_location>

namespace emulator {

// Where in the kernel a function was called.
using Place = std::source_location;

struct Block {
  dim3 grid, size;
  uint3 index;
  int threads;
  unsigned char* shared;  // dynamic shared memory
  size_t shared_bytes;
};

struct Thread {
  uint3 index;
  int number, warp, lane;
  Block* block;
};

// The CUDA thread whose fiber this OS thread runs.
extern thread_local Thread* current;

[[noreturn]] void fail(const char* what, Place = Place::current());
[[noreturn]] void fail(const char* what, const char* place);

// Runs body(argument) as every thread of every block of the grid.
void run(void (*body)(const void* argument), const void* argument, dim3 grid, dim3 block,
         size_t shared_bytes, Place);

// Fibers that were switched to since the last call of this, for measurements.
uint64_t switches();

// --------------------------------------------------------------------------------------------------
// Barriers of a block: number 0 is __syncthreads. Returns how many of the threads gave true.

int barrier(int number, int threads, bool predicate, Place);

// --------------------------------------------------------------------------------------------------
// Operations of a warp. The lanes of `mask` wait for each other; the last to come carries the
// operation out for all, `operands` being what each lane gave.

using Operation = void (*)(uint32_t mask, void* const (&operands)[32]);

void warp_operation(uint32_t mask, void* operand, Operation, Place);
void warp_barrier(uint32_t mask, Place);
// value becomes that of the lane `source`.
void shuffle(uint32_t mask, void* value, int bytes, int source, Place);
uint32_t ballot(uint32_t mask, bool predicate, Place);
// The lanes whose values equal this lane's.
uint32_t match_any(uint32_t mask, const void* value, int bytes, Place);

// Tensor cores: d (16 x 8) += a (16 x k) times b (k x 8), fragments as the PTX ISA lays them out.
enum class Factor { float16, bfloat16, tf32 };
void multiply_matrices(Factor, float* d, const uint32_t* a, const uint32_t* b, Place);
uint32_t round_to_tf32(float);

// ldmatrix: `row` is the address of row lane % 8 of matrix lane / 8.
void load_matrices(uint32_t* matrices, const void* row, bool transposed, Place);

// --------------------------------------------------------------------------------------------------
// cp.async: copies `valid` bytes and fills up with zeros to `bytes`.

void copy_async(void* to, const void* from, int valid, int bytes, Place);
void commit_copies();
void wait_for_copies(int latest);

}  // namespace emulator
