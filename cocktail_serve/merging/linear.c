/* out[i] = round(sum_m weights[m] * inputs[m][i]), in one pass over all inputs.
 *
 * Every product and every sum is rounded to double on its own, in the order of the models, and the sum once to the
 * output dtype, to nearest even. Compiled with -ffp-contract=off, so that nothing is fused, and called for any range of
 * elements: threads and chunks leave no trace in the bits. The same arithmetic stands in linear.py for torch and in
 * cuda.py for Triton.
 *
 * Vectors are GNU C's (gcc, clang): where the machine has narrower ones, the compiler splits them.
 */
#include <fenv.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif

enum { FLOAT32, FLOAT16, BFLOAT16, FLOAT64 };

#define BLOCK 1024 /* elements summed before they are rounded: their sums stay in the first cache */
#define RUNS 10    /* inputs summed in one pass over a block's sums */
#define STEP 32    /* elements per turn of the innermost loop, four vectors of sums */
#define AHEAD 1024 /* bytes that each input is fetched ahead: no prefetcher of a core follows ten of them */

typedef uint32_t u32x8 __attribute__((vector_size(32)));
typedef int32_t i32x8 __attribute__((vector_size(32)));
typedef float f32x8 __attribute__((vector_size(32)));
typedef uint16_t u16x8 __attribute__((vector_size(16)));
typedef double f64x8 __attribute__((vector_size(64)));

#define INLINE static inline __attribute__((always_inline))

INLINE f64x8 widen(f32x8 values) {
#ifdef __AVX512F__ /* gcc before 13 makes two halves of it */
    return (f64x8)_mm512_cvtps_pd((__m256)values);
#else
    return __builtin_convertvector(values, f64x8);
#endif
}

/* To float, rounded to odd: what is then rounded to nearest, to two bits less or more, is as if rounded once
 * (Boldo and Melquiond, "Emulation of a FMA and correctly rounded sums", 2008). Towards zero, with the last bit set
 * unless the float is exact; where only rounding to nearest is at hand, a step back from an even neighbour. */
INLINE i32x8 to_odd(f64x8 sum) {
#if defined(__AVX512F__) && defined(__AVX512VL__)
    __m256 below = _mm512_cvt_roundpd_ps((__m512d)sum, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
    __mmask8 inexact = _mm512_cmp_pd_mask(_mm512_cvtps_pd(below), (__m512d)sum, _CMP_NEQ_OQ);
    __m256i bits = _mm256_castps_si256(below);
    return (i32x8)_mm256_mask_or_epi32(bits, inexact, bits, _mm256_set1_epi32(1));
#else
    f32x8 nearest = __builtin_convertvector(sum, f32x8);
    f64x8 rest = sum - widen(nearest);
    i32x8 bits = (i32x8)nearest;
    i32x8 above = __builtin_convertvector(rest > 0, i32x8);
    i32x8 below = __builtin_convertvector(rest < 0, i32x8);
    i32x8 away = above ^ (bits >> 31); /* from zero, the step grows the bits */
    return bits + (~(away + away) & (above | below) & ((bits & 1) - 1));
#endif
}

/* In the low half of each element. A NaN keeps its upper bits; the conversion from double has
 * set the quiet one among them. */
INLINE u32x8 to_bfloat16(f64x8 sum) {
    i32x8 odd = to_odd(sum);
    u32x8 bits = (u32x8)odd;
    u32x8 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
#if defined(__AVX512F__) && defined(__AVX512VL__)
    __mmask8 nan = _mm256_cmp_ps_mask((__m256)odd, (__m256)odd, _CMP_UNORD_Q);
    return (u32x8)_mm256_mask_srli_epi32((__m256i)rounded, nan, (__m256i)bits, 16);
#else
    u32x8 nan = (u32x8)((odd & 0x7fffffff) > 0x7f800000);
    return (nan & (bits >> 16)) | (~nan & rounded);
#endif
}

INLINE float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE uint32_t to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* Exact, by moving exponent and mantissa into place; a subnormal one is made normal by a subtraction. */
INLINE float half_to_float(uint16_t half) {
    const uint32_t bias = 112u << 23, top = 0x7c00u << 13;
    uint32_t magnitude = (uint32_t)(half & 0x7fff) << 13;
    uint32_t exponent = magnitude & top;
    uint32_t normal = magnitude + bias + (exponent == top ? bias : 0);
    uint32_t subnormal = to_bits(from_bits(magnitude + bias + (1u << 23)) - from_bits(bias + (1u << 23)));
    return from_bits((exponent == 0 ? subnormal : normal) | (uint32_t)(half & 0x8000) << 16);
}

/* The layouts of what is read. PAIRS is bfloat16 again: 16 elements are taken as 8 words, whose upper halves are floats
 * once the lower ones are masked, and whose lower ones are once shifted. Nothing is shuffled, and the sums lie in the
 * order in which the result is put together again. */
enum { PAIRS = FLOAT64 + 1 };

INLINE void load(int layout, const char *input, f64x8 values[4]) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        if (layout == FLOAT64) {
            memcpy(&values[i], input + 64 * i, 64);
        } else if (layout == FLOAT32) {
            f32x8 floats;
            memcpy(&floats, input + 32 * i, 32);
            values[i] = widen(floats);
        } else if (layout == PAIRS) {
            u32x8 words;
            memcpy(&words, input + 32 * (i / 2), 32);
            values[i] = widen((f32x8)(i % 2 ? words & 0xffff0000 : words << 16));
        } else {
            u16x8 halves;
            memcpy(&halves, input + 16 * i, 16);
            if (layout == BFLOAT16) {
                values[i] = widen((f32x8)(__builtin_convertvector(halves, u32x8) << 16));
            } else {
#ifdef __F16C__
                values[i] = widen((f32x8)_mm256_cvtph_ps((__m128i)halves));
#else
                f32x8 floats;
                for (int j = 0; j < 8; j++)
                    floats[j] = half_to_float(halves[j]);
                values[i] = widen(floats);
#endif
            }
        }
    }
}

static const size_t ITEM_BYTES[] = {[FLOAT32] = 4, [FLOAT16] = 2, [BFLOAT16] = 2, [FLOAT64] = 8, [PAIRS] = 2};

/* Adds `count` inputs to the sums of `size` elements, a multiple of STEP. What is fetched beyond the end is the next
 * block's, or nobody's: a prefetch never faults. */
INLINE void add(int layout, int count, int is_first, const char *const *inputs, const double *weights,
                f64x8 *sums, size_t size) {
    const size_t bytes = STEP * ITEM_BYTES[layout];
    const char *input[RUNS];
    f64x8 weight[RUNS];
#pragma GCC unroll 10
    for (int m = 0; m < count; m++) {
        input[m] = inputs[m];
        weight[m] = (f64x8){weights[m], weights[m], weights[m], weights[m],
                            weights[m], weights[m], weights[m], weights[m]};
    }
    for (size_t at = 0, offset = 0; at < size; at += STEP, offset += bytes, sums += 4) {
#pragma GCC unroll 10
        for (int m = 0; m < count; m++)
#pragma GCC unroll 4
            for (size_t line = 0; line < bytes; line += 64)
                __builtin_prefetch(input[m] + offset + line + AHEAD);
        f64x8 a, b, c, d, values[4];
        if (is_first) {
            a = b = c = d = -(f64x8){0}; /* -0.0 leaves the first term as it is, whatever its sign */
        } else {
            a = sums[0], b = sums[1], c = sums[2], d = sums[3];
        }
#pragma GCC unroll 10
        for (int m = 0; m < count; m++) {
            load(layout, input[m] + offset, values);
            a = a + weight[m] * values[0];
            b = b + weight[m] * values[1];
            c = c + weight[m] * values[2];
            d = d + weight[m] * values[3];
        }
        sums[0] = a, sums[1] = b, sums[2] = c, sums[3] = d;
    }
}

#define ARGUMENTS \
    int count, int is_first, const char *const *inputs, const double *weights, f64x8 *sums, size_t size
#define ADD(LAYOUT, COUNT)                                               \
    case COUNT:                                                          \
        add(LAYOUT, COUNT, is_first, inputs, weights, sums, size);       \
        break;
#define DEFINE(LAYOUT)                                                                             \
    static void add_##LAYOUT(ARGUMENTS) {                                                          \
        switch (count) {                                                                           \
            ADD(LAYOUT, 1) ADD(LAYOUT, 2) ADD(LAYOUT, 3) ADD(LAYOUT, 4) ADD(LAYOUT, 5)             \
            ADD(LAYOUT, 6) ADD(LAYOUT, 7) ADD(LAYOUT, 8) ADD(LAYOUT, 9) ADD(LAYOUT, 10)            \
        }                                                                                          \
    }
DEFINE(FLOAT32)
DEFINE(FLOAT16)
DEFINE(BFLOAT16)
DEFINE(FLOAT64)
DEFINE(PAIRS)

typedef void add_function(ARGUMENTS);
static add_function *const ADDERS[] = {add_FLOAT32, add_FLOAT16, add_BFLOAT16, add_FLOAT64, add_PAIRS};

/* To nearest even; the addition for subnormal results lines the mantissas up, and so rounds. */
INLINE uint16_t float_to_half(float value) {
    const uint32_t magic = 126u << 23;
    uint32_t bits = to_bits(value), sign = bits & 0x80000000u, magnitude = bits ^ sign;
    uint32_t large = magnitude > 0x7f800000u ? 0x7e00 : 0x7c00;
    uint32_t small = to_bits(from_bits(magnitude) + from_bits(magic)) - magic;
    uint32_t normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    uint32_t half = magnitude >= (143u << 23) ? large : magnitude < (113u << 23) ? small : normal;
    return (uint16_t)(half | sign >> 16);
}

INLINE u16x8 to_float16(f64x8 sum) {
    i32x8 odd = to_odd(sum);
    u16x8 halves;
#ifdef __F16C__
    halves = (u16x8)_mm256_cvtps_ph((__m256)odd, _MM_FROUND_TO_NEAREST_INT);
#else
    for (int j = 0; j < 8; j++)
        halves[j] = float_to_half(from_bits((uint32_t)odd[j]));
#endif
    return halves;
}

/* Rounds the sums of `size` elements, a multiple of STEP; `layout` is PAIRS or the output dtype. */
static void store(int layout, const f64x8 *sums, char *out, size_t size) {
    for (size_t i = 0; i < size / 8; i++) {
        if (layout == PAIRS) {
            u32x8 words = to_bfloat16(sums[i]) | (to_bfloat16(sums[i + 1]) << 16);
            memcpy(out + 16 * i, &words, 32);
            i++;
        } else if (layout == FLOAT32) {
            f32x8 floats = __builtin_convertvector(sums[i], f32x8);
            memcpy(out + 32 * i, &floats, 32);
        } else {
            u16x8 halves = layout == FLOAT16 ? to_float16(sums[i])
                                             : __builtin_convertvector(to_bfloat16(sums[i]), u16x8);
            memcpy(out + 16 * i, &halves, 16);
        }
    }
}

/* A pass over consecutive inputs of one layout, as even in length as can be: eleven are summed as six and five. */
static size_t pass_length(const uint8_t *dtypes, size_t first, size_t models) {
    size_t same = 1;
    while (first + same < models && dtypes[first + same] == dtypes[first])
        same++;
    size_t passes = (same + RUNS - 1) / RUNS;
    return (same + passes - 1) / passes;
}

/* `size` elements from `at` on, a multiple of STEP up to BLOCK. */
static void merge_block(const char *const *inputs, const uint8_t *dtypes, const double *weights, size_t models,
                        char *out, int out_dtype, int is_pairs, size_t at, size_t size) {
    f64x8 sums[BLOCK / 8];
    const char *runs[RUNS];
    for (size_t m = 0; m < models;) {
        size_t count = pass_length(dtypes, m, models);
        for (size_t i = 0; i < count; i++)
            runs[i] = inputs[m + i] + at * ITEM_BYTES[dtypes[m]];
        ADDERS[is_pairs ? PAIRS : dtypes[m]](count, m == 0, runs, weights + m, sums, size);
        m += count;
    }
    store(is_pairs ? PAIRS : out_dtype, sums, out + at * ITEM_BYTES[out_dtype], size);
}

/* The last elements, fewer than STEP: as a whole step, in copies. */
static void merge_rest(const char *const *inputs, const uint8_t *dtypes, const double *weights, size_t models,
                       char *out, int out_dtype, size_t at, size_t size) {
    f64x8 sums[STEP / 8];
    char copy[STEP * 8];
    const char *run = copy;
    for (size_t m = 0; m < models; m++) {
        size_t item_bytes = ITEM_BYTES[dtypes[m]];
        memset(copy, 0, sizeof copy);
        memcpy(copy, inputs[m] + at * item_bytes, size * item_bytes);
        ADDERS[dtypes[m]](1, m == 0, &run, weights + m, sums, STEP);
    }
    store(out_dtype, sums, copy, STEP);
    memcpy(out + at * ITEM_BYTES[out_dtype], copy, size * ITEM_BYTES[out_dtype]);
}

void cocktail_merge(const char *const *inputs, const uint8_t *dtypes, const double *weights, size_t models, char *out,
                    int out_dtype, size_t size) {
    fenv_t callers;
    fegetenv(&callers);
    fesetenv(FE_DFL_ENV); /* a library may have set its threads to flush subnormal numbers */
    int is_pairs = out_dtype == BFLOAT16;
    for (size_t m = 0; m < models; m++)
        is_pairs &= dtypes[m] == BFLOAT16;
    size_t at = 0, whole = size / STEP * STEP;
    for (; at < whole; at += BLOCK)
        merge_block(inputs, dtypes, weights, models, out, out_dtype, is_pairs, at,
                    whole - at < BLOCK ? whole - at : BLOCK);
    if (whole < size)
        merge_rest(inputs, dtypes, weights, models, out, out_dtype, whole, size - whole);
    fesetenv(&callers);
}
