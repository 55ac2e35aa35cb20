// What the kernels ask of the machine, in one thin layer. tests/emulator/machine.h is its twin on the CPU.
#pragma once
#include <cuda_runtime.h>

#include <array>
#include <cstdint>
#include <map>
#include <mutex>

#define KD_DEVICE __device__ __forceinline__
#define KD_SLOW inline __device__ __noinline__  // keeps the registers of rare double arithmetic out of the common path
#define KD_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)  // at least, to a multiprocessor
#define KD_PARAMS const __grid_constant__

namespace kd::gpu {

extern __shared__ __align__(128) char dynamic_shared[];

KD_DEVICE int thread() { return threadIdx.x; }
KD_DEVICE int threads() { return blockDim.x; }
KD_DEVICE int block() { return blockIdx.x; }
KD_DEVICE int blocks() { return gridDim.x; }
KD_DEVICE char* shared() { return dynamic_shared; }
KD_DEVICE void sync() { __syncthreads(); }
KD_DEVICE void sync_warp() { __syncwarp(); }
KD_DEVICE bool any(bool x) { return __any_sync(~0u, x); }
template <typename T> KD_DEVICE T shuffle_xor(T x, int distance) { return __shfl_xor_sync(~0u, x, distance); }

// Two units in the last place; what underflows is 0.
KD_DEVICE float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

KD_DEVICE uint32_t float_bits(float x) { return __float_as_uint(x); }
KD_DEVICE float bits_float(uint32_t x) { return __uint_as_float(x); }

struct BF16 { uint16_t bits; };
struct F16 { uint16_t bits; };

KD_DEVICE float widen(float x) { return x; }
KD_DEVICE float widen(BF16 x) { return bits_float(uint32_t(x.bits) << 16); }
KD_DEVICE float widen(F16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
KD_DEVICE void narrow(float x, float* y) { *y = x; }
KD_DEVICE void narrow(float x, BF16* y) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y->bits) : "f"(x)); }
KD_DEVICE void narrow(float x, F16* y) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y->bits) : "f"(x)); }

// Two in a word, the first in its low half. The larger of each, where either is a number.
KD_DEVICE uint32_t max2(uint32_t x, uint32_t y, BF16*) {
  asm("max.bf16x2 %0, %0, %1;" : "+r"(x) : "r"(y));
  return x;
}
KD_DEVICE uint32_t max2(uint32_t x, uint32_t y, F16*) {
  asm("max.f16x2 %0, %0, %1;" : "+r"(x) : "r"(y));
  return x;
}
KD_DEVICE uint32_t narrow2(float x, float y, BF16*) {
  uint32_t z;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(z) : "f"(y), "f"(x));
  return z;
}
KD_DEVICE uint32_t narrow2(float x, float y, F16*) {
  uint32_t z;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(z) : "f"(y), "f"(x));
  return z;
}

struct alignas(16) Bytes16 { uint32_t word[4]; };

// Kept in L2 for a second sweep, or read for the last time; neither stays in L1.
KD_DEVICE Bytes16 load16(const void* from) {
  const uint4 x = __ldcg(static_cast<const uint4*>(from));
  return {{x.x, x.y, x.z, x.w}};
}
KD_DEVICE Bytes16 load16_last(const void* from) {
  const uint4 x = __ldcs(static_cast<const uint4*>(from));
  return {{x.x, x.y, x.z, x.w}};
}
KD_DEVICE void store16(void* to, const Bytes16& x) {
  __stcs(static_cast<uint4*>(to), make_uint4(x.word[0], x.word[1], x.word[2], x.word[3]));
}

// How many blocks were here before; what they had written by then is there for those that come after.
KD_DEVICE int arrive(int* counter) {
  __threadfence();
  const int before = atomicAdd(counter, 1);
  __threadfence();
  return before;
}
// Integers: their sum does not depend on the order.
KD_DEVICE void add_shared(uint32_t* to, uint32_t x) { atomicAdd(to, x); }
template <typename X> KD_DEVICE void add_global(X* to, X x) { atomicAdd(to, x); }
KD_DEVICE double load_shared_by_blocks(const double* from) { return __ldcg(from); }

// Clusters, distributed shared memory and bulk copies: Hopper and later. Elsewhere the kernels that use them only trap.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define KD_CLUSTERS 1
KD_DEVICE uint32_t address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }
KD_DEVICE int cluster_rank() {
  uint32_t x;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(x));
  return int(x);
}
KD_DEVICE int cluster_size() {
  uint32_t x;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(x));
  return int(x);
}
KD_DEVICE void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
KD_DEVICE void store_remote(double* mine, int rank, double x) {
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address(mine)), "r"(rank));
  asm volatile("st.shared::cluster.f64 [%0], %1;" ::"r"(there), "d"(x) : "memory");
}
KD_DEVICE void store_remote(uint32_t* mine, int rank, uint32_t x) {
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address(mine)), "r"(rank));
  asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(there), "r"(x) : "memory");
}
KD_DEVICE uint32_t load_remote(const uint32_t* mine, int rank) {
  uint32_t there, x;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address(mine)), "r"(rank));
  asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(x) : "r"(there) : "memory");
  return x;
}
KD_DEVICE void barrier_init(uint64_t* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\nfence.mbarrier_init.release.cluster;" ::"r"(address(barrier))
               : "memory");
}
// The phase completes when this many bytes have arrived.
KD_DEVICE void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(barrier)), "r"(bytes) : "memory");
}
KD_DEVICE void barrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}"
      ::"r"(address(barrier)), "r"(parity) : "memory");
}
// Orders what this thread has read and written of shared memory before the bulk copies it issues.
KD_DEVICE void fence_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
KD_DEVICE void bulk_copy(void* to_shared, const void* from, uint32_t bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   address(to_shared)), "l"(from), "r"(bytes), "r"(address(barrier)) : "memory");
}
#endif

// Host side.
struct Device { int index, processors, shared, major; };  // shared: bytes a block may have
inline Device device() {
  Device d{};
  cudaGetDevice(&d.index);
  cudaDeviceGetAttribute(&d.processors, cudaDevAttrMultiProcessorCount, d.index);
  cudaDeviceGetAttribute(&d.shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, d.index);
  cudaDeviceGetAttribute(&d.major, cudaDevAttrComputeCapabilityMajor, d.index);
  return d;
}

struct Shape { int blocks, threads, shared, cluster; };

// What the driver says of a kernel and a shape: asked once, by whichever host thread is the first.
template <typename P, typename F> int once(void (*kernel)(P), const Shape& z, F ask) {
  static std::mutex mutex;
  static std::map<std::array<intptr_t, 5>, int> known;
  const std::array<intptr_t, 5> key{reinterpret_cast<intptr_t>(kernel), device().index, z.threads, z.shared, z.cluster};
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(key);
  return found != known.end() ? found->second : known[key] = ask();
}

// Allows a kernel all the shared memory and the largest clusters that there are, once and for all: another host thread
// may be about to launch it with another shape.
template <typename P> int prepare(void (*kernel)(P), int /*shared*/, bool wide_clusters) {
  return once(kernel, Shape{0, 0, 0, wide_clusters}, [&] {
    const int shared = device().shared;
    if (cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared)) return int(e);
    if (!wide_clusters) return int(cudaSuccess);
    return int(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  });
}
// Blocks of this shape that a multiprocessor holds at once.
template <typename P> int resident(void (*kernel)(P), int threads, int shared) {
  return once(kernel, Shape{0, threads, shared, 1}, [&] {
    int blocks = 0;
    cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared);
    return blocks > 0 ? blocks : 1;
  });
}
// A launch of this shape; the attribute it points to is its own.
struct Config {
  cudaLaunchConfig_t launch{};
  cudaLaunchAttribute cluster{};
  explicit Config(const Shape& z, int blocks, void* stream = nullptr) {
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {unsigned(z.cluster), 1, 1};
    launch.gridDim = dim3(blocks);
    launch.blockDim = dim3(z.threads);
    launch.dynamicSmemBytes = z.shared;
    launch.stream = static_cast<cudaStream_t>(stream);
    launch.attrs = &cluster;
    launch.numAttrs = z.cluster > 1;
  }
  Config(const Config&) = delete;
};
// Clusters of this shape (of two blocks or more) that the device holds at once; 0 where it cannot.
template <typename P> int resident_clusters(void (*kernel)(P), const Shape& z) {
  return once(kernel, z, [&] {
    const Config config(z, z.cluster);
    int clusters = 0;
    if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config.launch) == cudaSuccess) return clusters;
    cudaGetLastError();
    return 0;
  });
}
template <typename P> int launch(void (*kernel)(P), const Shape& z, void* stream, const P& params) {
  const Config config(z, z.blocks, stream);
  return cudaLaunchKernelEx(&config.launch, kernel, params);
}

}  // namespace kd::gpu
