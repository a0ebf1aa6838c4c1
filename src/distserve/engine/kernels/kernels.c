/* The CPU kernels of distserve, one translation unit: compiled once per machine by build.py, called through ctypes by
 * bindings.py. Results do not depend on the number of threads, nor on what else is in a batch.
 */
#define _GNU_SOURCE
#ifdef _OPENMP
#include <omp.h>
#endif

#include "common.h"

#include "linear.h"

#include "attention.h"

#define NUMBER float
#define LOAD(x) (x)
#define STORE(x) (x)
#define NAME(x) x##_f32
#define LOAD16(from, mask) _mm512_maskz_loadu_ps(mask, from)
#define STORE16(to, mask, x) _mm512_mask_storeu_ps(to, mask, x)
#include "pointwise.h"

#define NUMBER bf16
#define LOAD(x) from_bf16(x)
#define STORE(x) to_bf16(x)
#define NAME(x) x##_bf16
#define LOAD16(from, mask) load_bf16(from, mask)
#define STORE16(to, mask, x) _mm256_mask_storeu_epi16(to, mask, (__m256i)_mm512_cvtneps_pbh(x))
#include "pointwise.h"

#include "stack.h"

EXPORT void ds_set_num_threads(int64_t count) { num_threads = (int)MAX(1, count); }

EXPORT int64_t ds_has_threads(void) {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}

/* What multiplies: 2 AMX tiles, 1 vector units, 0 nothing here. The most that this machine has, the system lets this process
 * use (Linux: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)) and `most` allows. Call before threads are started. */
EXPORT int64_t ds_init(int64_t most) {
#ifdef HAVE_AMX
    tiles_allowed = most >= 2 && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
    if (tiles_allowed) return 2;
#endif
#ifdef HAVE_BF16_VECTORS
    return MIN(most, 1);
#else
    (void)most;
    return 0;
#endif
}
