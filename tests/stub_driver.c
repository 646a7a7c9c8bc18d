// A libcuda.so.1 for machines without a GPU. It answers what triton's host code asks as one H100 would, launches
// nothing, counts launches and TMA descriptors, and refuses those beyond the limits that cuda.h documents for
// cuLaunchKernelEx and cuTensorMapEncodeTiled. tests/stub_driver.py drives kernels through it.

#include <cuda.h>
#include <string.h>

enum { SHARED_LIMIT = 227 * 1024, THREADS = 1024 };

long stub_launches, stub_descriptors, stub_refused; // read by name, through ctypes

static const char *reason = "nothing was refused";

static CUresult refuse(const char *why) {
  reason = why;
  stub_refused++;
  return CUDA_ERROR_INVALID_VALUE;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **params, void **extra) {
  unsigned long long threads = 1ull * c->blockDimX * c->blockDimY * c->blockDimZ;
  stub_launches++;
  if (c->gridDimX < 1 || c->gridDimX > 0x7fffffff) return refuse("grid x is not 1 to 2^31 - 1");
  if (c->gridDimY < 1 || c->gridDimY > 65535) return refuse("grid y is not 1 to 65,535");
  if (c->gridDimZ < 1 || c->gridDimZ > 65535) return refuse("grid z is not 1 to 65,535");
  if (threads < 1 || threads > THREADS) return refuse("the block does not have 1 to 1024 threads");
  if (c->sharedMemBytes > SHARED_LIMIT) return refuse("more than 232,448 bytes of shared memory");
  return CUDA_SUCCESS;
}

// Bytes of an element of the types that kernels have.
static unsigned bytes_of(CUtensorMapDataType type) {
  if (type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16 || type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16) return 2;
  return type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 ? 4 : 0;
}

// Dimension 0 is the innermost, which has no stride.
CUresult cuTensorMapEncodeTiled(
    CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address, const cuuint64_t *dims,
    const cuuint64_t *strides, const cuuint32_t *box, const cuuint32_t *steps, CUtensorMapInterleave interleave,
    CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  unsigned inner = box[0] * bytes_of(type), span = swizzle < CU_TENSOR_MAP_SWIZZLE_128B ? 16 << swizzle : 128;
  stub_descriptors++;
  if (!bytes_of(type) || interleave) return refuse("a type or an interleave that no kernel has");
  if ((size_t)map % 64) return refuse("the descriptor is not aligned to 64 bytes");
  if ((size_t)address % 16) return refuse("the address is not aligned to 16 bytes");
  if (rank < 1 || rank > 5) return refuse("the rank is not 1 to 5");
  for (unsigned i = 0; i < rank; i++) {
    if (dims[i] < 1 || dims[i] > 1ull << 32) return refuse("a dimension is not 1 to 2^32");
    if (box[i] < 1 || box[i] > 256) return refuse("a side of the box is not 1 to 256");
    if (i && (steps[i] < 1 || steps[i] > 8)) return refuse("an element stride is not 1 to 8");
    if (i && strides[i - 1] % 16) return refuse("a stride is not a multiple of 16 bytes");
    if (i && strides[i - 1] >= 1ull << 40) return refuse("a stride is not below 2^40 bytes");
  }
  if (inner % 16) return refuse("the inner side of the box is not a multiple of 16 bytes");
  if (swizzle && inner > span) return refuse("the inner side of the box is beyond the swizzle");
  memset(map, 0, sizeof *map);
  return CUDA_SUCCESS;
}

// ---- what else triton asks: handles are never looked into, and host memory passes for the device's

#define ANSWER(name, answer, ...) CUresult name(__VA_ARGS__) { answer; return CUDA_SUCCESS; }

ANSWER(cuGetErrorString, *text = reason, CUresult error, const char **text)
ANSWER(cuDriverGetVersion, *version = CUDA_VERSION, int *version)
ANSWER(cuDeviceGet, *device = 0, CUdevice *device, int ordinal)
ANSWER(cuDeviceGetAttribute, // all but the first is large enough
       *value = a == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN ? SHARED_LIMIT : 1 << 20,
       int *value, CUdevice_attribute a, CUdevice device)
ANSWER(cuDevicePrimaryCtxRetain, *context = (CUcontext)1, CUcontext *context, CUdevice device)
ANSWER(cuCtxGetCurrent, *context = (CUcontext)1, CUcontext *context)
ANSWER(cuCtxSetCurrent, , CUcontext context)
ANSWER(cuCtxGetDevice, *device = 0, CUdevice *device)
ANSWER(cuCtxGetLimit, *value = 0, size_t *value, CUlimit limit)
ANSWER(cuCtxSetLimit, , CUlimit limit, size_t value)
ANSWER(cuModuleLoadData, *module = (CUmodule)1, CUmodule *module, const void *image)
ANSWER(cuModuleUnload, , CUmodule module)
ANSWER(cuModuleGetFunction, *f = (CUfunction)1, CUfunction *f, CUmodule module, const char *name)
ANSWER(cuFuncGetAttribute, *value = a == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? THREADS : 0,
       int *value, CUfunction_attribute a, CUfunction f)
ANSWER(cuFuncSetAttribute, , CUfunction f, CUfunction_attribute a, int value)
ANSWER(cuFuncSetCacheConfig, , CUfunction f, CUfunc_cache config)
ANSWER(cuPointerGetAttribute, *(CUdeviceptr *)value = p, void *value, CUpointer_attribute a, CUdeviceptr p)
ANSWER(cuOccupancyMaxActiveClusters, *count = 1, int *count, CUfunction f, const CUlaunchConfig *config)
ANSWER(cuStreamIsCapturing, *status = CU_STREAM_CAPTURE_STATUS_NONE, CUstream stream, CUstreamCaptureStatus *status)
