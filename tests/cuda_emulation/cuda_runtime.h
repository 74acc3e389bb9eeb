// Stands in for CUDA's header of this name and runs kernels in host memory: enough of CUDA for csrc/cuda, no more.
//
// Blocks run one after the other, and in a block each warp as far as it comes without the others. A thread is a fibre
// that runs until it has to wait: at a barrier, or where the lanes of its warp exchange values. Every other block wakes
// its threads in falling order and every other launch takes its blocks in falling order, so that code which needs an
// order it did not ask for gives a wrong result. Threads that would wait forever, or meet in different places, are an
// exception. What cannot be seen here: an exchange of values orders memory like a barrier, which CUDA does not promise.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __shared__ static  // one block at a time; what an earlier block left is still there

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace emulation {

constexpr unsigned kLanes = 32;
constexpr size_t kStack = size_t{1} << 16;

// Threads that wait for one another, each with a value for the others.
struct Meeting {
  uint64_t brought[kLanes] = {};
  uint64_t shown[kLanes] = {};
  unsigned arrived = 0;
  unsigned wanted = 0;
  unsigned long rounds = 0;
  const char* place = nullptr;
};

struct Fibre {
  std::unique_ptr<char[]> stack{new char[kStack]};
  ucontext_t start{};
  jmp_buf here{};
  bool started = false;
  bool done = true;
};

struct Machine {
  std::vector<Fibre> fibres;
  std::vector<Meeting> warps;
  Meeting block;  // counts; brings no values
  std::function<void()> kernel;
  jmp_buf scheduler{};
  Fibre* running = nullptr;
  unsigned long steps = 0;  // anything that a waiting thread may have waited for
  unsigned long launches = 0;
  std::string mistake;
};
inline Machine machine;

inline void wait() {
  if (_setjmp(machine.running->here) == 0) {
    _longjmp(machine.scheduler, 1);
  }
}

inline void live() {
  for (;;) {
    machine.kernel();
    machine.running->done = true;
    ++machine.steps;
    wait();
  }
}

// Runs a fibre until it waits or is done.
inline void resume(Fibre& fibre) {
  machine.running = &fibre;
  if (_setjmp(machine.scheduler) != 0) {
    return;
  }
  if (fibre.started) {
    _longjmp(fibre.here, 1);
  }
  fibre.started = true;
  getcontext(&fibre.start);
  fibre.start.uc_stack.ss_sp = fibre.stack.get();
  fibre.start.uc_stack.ss_size = kStack;
  makecontext(&fibre.start, live, 0);
  setcontext(&fibre.start);
}

inline void mistake(const std::string& what) {
  machine.mistake = what + " in block " + std::to_string(blockIdx.x) + ", thread " + std::to_string(threadIdx.x);
  for (;;) {
    wait();
  }
}

// The values of all lanes in the mask, when all of them are at the same place.
inline const uint64_t* meet(unsigned mask, uint64_t value, const char* place) {
  Meeting& warp = machine.warps[threadIdx.x / kLanes];
  const unsigned lane = threadIdx.x % kLanes;
  if (warp.arrived != 0 && (warp.place != place || warp.wanted != mask)) {
    mistake(std::string("lanes meet in different places: ") + warp.place + " and " + place);
  }
  warp.place = place;
  warp.wanted = mask;
  warp.brought[lane] = value;
  warp.arrived |= 1u << lane;
  if (warp.arrived == mask) {
    std::memcpy(warp.shown, warp.brought, sizeof warp.shown);
    warp.arrived = 0;
    ++warp.rounds;
    ++machine.steps;
    return warp.shown;
  }
  for (const unsigned long round = warp.rounds; warp.rounds == round;) {
    wait();
  }
  return warp.shown;
}

// Runs a warp as far as it comes without the others; whether some of it is left.
inline bool run_warp(unsigned warp, bool falling) {
  for (;;) {
    bool alive = false;
    const unsigned long before = machine.steps;
    for (unsigned i = 0; i < kLanes; ++i) {
      threadIdx.x = warp * kLanes + (falling ? kLanes - 1 - i : i);
      Fibre& fibre = machine.fibres[threadIdx.x];
      if (!fibre.done) {
        resume(fibre);
        alive = alive || !fibre.done;
      }
    }
    if (!alive || machine.steps == before || !machine.mistake.empty()) {
      return alive;
    }
  }
}

inline void run_block() {
  const bool falling = blockIdx.x % 2 != 0;
  const auto count = static_cast<unsigned>(machine.warps.size()) * kLanes;
  for (unsigned i = 0; i < count; ++i) {
    machine.fibres[i].done = false;
  }
  for (bool alive = true; alive;) {
    alive = false;
    const unsigned long before = machine.steps;
    for (unsigned warp = 0; warp < count / kLanes; ++warp) {
      alive = run_warp(falling ? count / kLanes - 1 - warp : warp, falling) || alive;
    }
    if (alive && machine.steps == before && machine.mistake.empty()) {
      machine.mistake = "threads of block " + std::to_string(blockIdx.x) + " wait for each other forever";
    }
    if (!machine.mistake.empty()) {
      machine.fibres.clear();  // what they wait for will not come
      throw std::runtime_error("emulated CUDA: " + std::exchange(machine.mistake, {}));
    }
  }
}

inline void run(dim3 grid, dim3 block, std::function<void()> kernel) {
  if (grid.x == 0 || grid.x > 0x7FFFFFFF || block.x == 0 || block.x > 1024 || block.x % kLanes != 0) {
    throw std::runtime_error("emulated CUDA: grid or block has a size that is not supported");
  }
  gridDim = grid;
  blockDim = block;
  machine.kernel = std::move(kernel);
  machine.warps.assign(block.x / kLanes, Meeting{});
  machine.block = Meeting{};
  if (machine.fibres.size() < block.x) {
    machine.fibres = std::vector<Fibre>(block.x);
  }
  const bool falling = machine.launches++ % 2 != 0;
  for (unsigned i = 0; i < grid.x; ++i) {
    blockIdx.x = falling ? grid.x - 1 - i : i;
    run_block();
  }
}

template <class Value>
uint64_t packed(Value value) {
  static_assert(sizeof(Value) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}

template <class Value>
Value unpacked(uint64_t bits) {
  Value value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace emulation

inline void __syncthreads() {
  emulation::Meeting& block = emulation::machine.block;
  if (++block.arrived == blockDim.x) {
    block.arrived = 0;
    ++block.rounds;
    ++emulation::machine.steps;
    return;
  }
  for (const unsigned long round = block.rounds; block.rounds == round;) {
    emulation::wait();
  }
}

inline void __syncwarp(unsigned mask = 0xFFFFFFFF) { emulation::meet(mask, 0, "__syncwarp"); }

template <class Value>
Value __shfl_sync(unsigned mask, Value value, int lane) {
  return emulation::unpacked<Value>(
      emulation::meet(mask, emulation::packed(value), "__shfl_sync")[static_cast<unsigned>(lane) % emulation::kLanes]);
}

template <class Value>
Value __shfl_xor_sync(unsigned mask, Value value, int flip) {
  const unsigned lane = threadIdx.x % emulation::kLanes;
  const uint64_t* all = emulation::meet(mask, emulation::packed(value), "__shfl_xor_sync");
  return emulation::unpacked<Value>(all[lane ^ static_cast<unsigned>(flip)]);
}

template <class Value>
Value __shfl_up_sync(unsigned mask, Value value, unsigned delta) {
  const unsigned lane = threadIdx.x % emulation::kLanes;
  const uint64_t* all = emulation::meet(mask, emulation::packed(value), "__shfl_up_sync");
  return lane < delta ? value : emulation::unpacked<Value>(all[lane - delta]);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const uint64_t* all = emulation::meet(mask, predicate != 0, "__ballot_sync");
  unsigned result = 0;
  for (unsigned lane = 0; lane < emulation::kLanes; ++lane) {
    result |= (mask >> lane & 1u) != 0 && all[lane] != 0 ? 1u << lane : 0;
  }
  return result;
}

inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }

inline unsigned __match_any_sync(unsigned mask, unsigned long long value) {
  const uint64_t* all = emulation::meet(mask, value, "__match_any_sync");
  unsigned result = 0;
  for (unsigned lane = 0; lane < emulation::kLanes; ++lane) {
    result |= (mask >> lane & 1u) != 0 && all[lane] == value ? 1u << lane : 0;
  }
  return result;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }

inline unsigned long long atomicAdd(unsigned long long* address, unsigned long long value) {
  const unsigned long long before = *address;
  *address += value;
  return before;
}

// ------------------------------------------------------------------------------------------- the host's part
using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

inline cudaError_t cudaMemsetAsync(void* address, int value, size_t bytes, cudaStream_t) {
  std::memset(address, value, bytes);
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(
    const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments... arguments) {
  emulation::run(config->gridDim, config->blockDim, [=] { kernel(arguments...); });
  return cudaSuccess;
}
