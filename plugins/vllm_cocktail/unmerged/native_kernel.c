/* y += ((x A) * c) B for the rows of a step: LoRA factors of many experts, each row with coefficients of its own.
 *
 * h = c * scaling * (x A) is summed in float32 from x and A as they are, in an order that depends on in_features alone,
 * and kept in float32; the sum over h and B is float32 again, expert by expert and rank by rank; y is read, added to and
 * rounded once, to nearest even. A row's result therefore depends on nothing but the row. What has a coefficient of zero
 * is not read, and a row without any other is not written. Where the machine has AVX512-BF16, products of bfloat16 are
 * summed in pairs and subnormal inputs count as zero.
 *
 * Threads are those of the OpenMP runtime that the process has already, called through the addresses that
 * `set_runtime` is given: a second runtime would fight with it over the cores.
 *
 * Vectors are GNU C's (gcc, clang): where the machine has narrower ones, the compiler splits them.
 */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif
#ifdef __ARM_NEON
#include <arm_neon.h>
#endif

enum { FLOAT32, FLOAT16, BFLOAT16 };

#ifdef __AVX512F__
#define LANES 16
#define TILE_ROWS 4 /* rows of x or y that one tile has sums of in registers */
#elif defined(__AVX__)
#define LANES 8
#define TILE_ROWS 2
#else
#define LANES 4
#define TILE_ROWS 4
#endif
#define TILE_RANKS 4             /* rows of A that one tile multiplies with its rows of x */
#define PAIR (2 * LANES)         /* elements that are loaded at once */
#define COLUMNS (2 * PAIR)       /* of y in one tile; rows of A and B are padded to a multiple of it */
#define BLOCK 64                 /* rows whose sums over experts a thread holds for COLUMNS of y */
#define ALONE (64 * 1024)        /* products in a call below which waking other threads costs more than it gains */

typedef float f32 __attribute__((vector_size(4 * LANES)));
typedef uint32_t u32 __attribute__((vector_size(4 * LANES)));
typedef int32_t i32 __attribute__((vector_size(4 * LANES)));
typedef uint16_t u16 __attribute__((vector_size(2 * LANES)));

#define INLINE static inline __attribute__((always_inline))

INLINE size_t smaller(size_t a, size_t b) { return a < b ? a : b; }
INLINE size_t item_bytes(int dtype) { return dtype == FLOAT32 ? 4 : 2; }

/* PAIR elements as two vectors. bfloat16 is taken as words, whose lower halves are floats once shifted and whose upper
 * ones are once the lower ones are masked: nothing is shuffled, and `store_pair` puts them together again. */
INLINE void load_pair(int dtype, const char *from, f32 pair[2]) {
    if (dtype == BFLOAT16) {
        u32 words;
        memcpy(&words, from, sizeof words);
        pair[0] = (f32)(words << 16);
        pair[1] = (f32)(words & 0xffff0000);
    } else if (dtype == FLOAT32) {
        memcpy(pair, from, 2 * sizeof(f32));
    } else {
#if defined(__AVX512F__)
        for (int i = 0; i < 2; i++)
            pair[i] = (f32)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(from + 32 * i)));
#elif defined(__F16C__)
        for (int i = 0; i < 2; i++)
            pair[i] = (f32)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + 16 * i)));
#elif defined(__ARM_NEON)
        for (int i = 0; i < 2; i++)
            pair[i] = (f32)vcvt_f32_f16(vld1_f16((const __fp16 *)(from + 8 * i)));
#else
        _Float16 halves[PAIR];
        memcpy(halves, from, sizeof halves);
        pair[0] = pair[1] = (f32){0};
        for (int i = 0; i < PAIR; i++)
            pair[i / LANES][i % LANES] = (float)halves[i];
#endif
    }
}

/* The upper halves of floats rounded to nearest even; a NaN stays one. In the low half of each element. */
INLINE u32 to_bfloat16(f32 value) {
    u32 bits = (u32)value, is_nan = (u32)(value != value);
    u32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (is_nan & ((bits >> 16) | 0x40)) | (~is_nan & rounded);
}

INLINE void store_pair(int dtype, const f32 pair[2], char *to) {
    if (dtype == BFLOAT16) {
        u32 words = to_bfloat16(pair[0]) | (to_bfloat16(pair[1]) << 16);
        memcpy(to, &words, sizeof words);
    } else if (dtype == FLOAT32) {
        memcpy(to, pair, 2 * sizeof(f32));
    } else {
#if defined(__AVX512F__)
        for (int i = 0; i < 2; i++)
            _mm256_storeu_si256((__m256i *)(to + 32 * i),
                                _mm512_cvtps_ph((__m512)pair[i], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
        for (int i = 0; i < 2; i++)
            _mm_storeu_si128((__m128i *)(to + 16 * i), _mm256_cvtps_ph((__m256)pair[i], _MM_FROUND_TO_NEAREST_INT));
#elif defined(__ARM_NEON)
        for (int i = 0; i < 2; i++)
            vst1_f16((__fp16 *)(to + 8 * i), vcvt_f16_f32((float32x4_t)pair[i]));
#else
        _Float16 halves[PAIR];
        for (int i = 0; i < PAIR; i++)
            halves[i] = (_Float16)pair[i / LANES][i % LANES];
        memcpy(to, halves, sizeof halves);
#endif
    }
}

INLINE float load_one(int dtype, const char *from) {
    char copy[4 * PAIR] = {0};
    f32 pair[2];
    memcpy(copy, from, item_bytes(dtype));
    load_pair(dtype, copy, pair);
    return pair[0][0];
}

INLINE f32 same(float value) { return value - (f32){0}; }

/* Always the same tree, so that a sum is one whatever tile it stands in. */
INLINE float sum_lanes(f32 sums) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)sums);
#else
    float lanes[LANES];
    memcpy(lanes, &sums, sizeof lanes);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++)
            lanes[i] += lanes[i + half];
    return lanes[0];
#endif
}

/* What a layer and a step are. */

typedef struct {
    const char *a; /* [rank, in_features], rows of a_stride elements; of an embedding [in_features, rank] */
    const char *b; /* [rank, out_features of the slice], rows of b_stride elements */
    size_t rank, a_stride, b_stride;
    float scaling;
} Factors;

typedef struct {
    size_t offset, width; /* columns of y */
} Slice;

typedef struct {
    int dtype, is_embedding;
    size_t in_features, num_slices, num_experts;
    Slice *slices;
    Factors *factors; /* [num_experts, num_slices]; rank 0 where an expert has none */
} Layer;

/* Rows of one block of BLOCK rows that one expert takes part in. */
typedef struct {
    size_t expert, block, first, count;
} Unit;

typedef struct {
    size_t num_rows, num_units, num_pairs;
    size_t unit_capacity, pair_capacity, h_capacity;
    Unit *units;         /* by block, then by expert */
    uint32_t *rows;      /* [num_pairs], of each unit in turn, ascending */
    float *coefficients; /* [num_pairs] */
    float *h;            /* of each unit, of each slice: [count, rank] */
} Step;

typedef struct {
    const Step *step;
    const Layer *layer;
    const char *x;
    char *y;
    size_t x_stride, y_stride, h_cost, y_cost; /* strides in bytes; an embedding's x_stride is the size of an id */
} Call;

static struct {
    void (*parallel)(void (*function)(void *), void *data, unsigned num_threads, unsigned flags);
    void (*barrier)(void);
    int (*num_threads)(void);
    int (*thread)(void);
    int (*max_threads)(void);
} runtime;

INLINE const Factors *factors_of(const Layer *layer, const Unit *unit, size_t slice) {
    static const Factors none;
    return unit->expert < layer->num_experts ? &layer->factors[unit->expert * layer->num_slices + slice] : &none;
}

/* h = c * scaling * (x A) */

/* Adds PAIR products of each row of x with each row of A. */
INLINE void dot_step(int dtype, int rows, int ranks, const char *const *x, const char *a, size_t a_stride, size_t at,
                     f32 sums[TILE_ROWS][TILE_RANKS]) {
#if defined(__AVX512F__) && defined(__AVX512BF16__)
    if (dtype == BFLOAT16) {
        __m512bh in_a[TILE_RANKS];
#pragma GCC unroll 4
        for (int j = 0; j < ranks; j++)
            in_a[j] = (__m512bh)_mm512_loadu_si512(a + j * a_stride + at);
#pragma GCC unroll 4
        for (int i = 0; i < rows; i++) {
            __m512bh in_x = (__m512bh)_mm512_loadu_si512(x[i] + at);
#pragma GCC unroll 4
            for (int j = 0; j < ranks; j++)
                sums[i][j] = (f32)_mm512_dpbf16_ps((__m512)sums[i][j], in_x, in_a[j]);
        }
        return;
    }
#endif
    f32 in_a[TILE_RANKS][2];
#pragma GCC unroll 4
    for (int j = 0; j < ranks; j++)
        load_pair(dtype, a + j * a_stride + at, in_a[j]);
#pragma GCC unroll 4
    for (int i = 0; i < rows; i++) {
        f32 in_x[2];
        load_pair(dtype, x[i] + at, in_x);
#pragma GCC unroll 4
        for (int j = 0; j < ranks; j++) {
            sums[i][j] += in_x[0] * in_a[j][0];
            sums[i][j] += in_x[1] * in_a[j][1];
        }
    }
}

/* h [rows, ranks] of `rows` rows of x and `ranks` rows of A. */
INLINE void dot_tile(int dtype, int rows, int ranks, const char *const *x, const char *a, size_t a_stride,
                     size_t in_features, const float *scales, float *h, size_t h_stride) {
    const size_t whole = in_features / PAIR * PAIR * item_bytes(dtype), rest = in_features * item_bytes(dtype) - whole;
    f32 sums[TILE_ROWS][TILE_RANKS];
#pragma GCC unroll 4
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < ranks; j++)
            sums[i][j] = (f32){0};
    for (size_t at = 0; at < whole; at += PAIR * item_bytes(dtype))
        dot_step(dtype, rows, ranks, x, a, a_stride, at, sums);
    if (rest) {
        char ends[TILE_ROWS][4 * PAIR] = {{0}};
        const char *pointers[TILE_ROWS];
        for (int i = 0; i < rows; i++) {
            memcpy(ends[i], x[i] + whole, rest);
            pointers[i] = ends[i];
        }
        dot_step(dtype, rows, ranks, pointers, a + whole, a_stride, 0, sums);
    }
#pragma GCC unroll 4
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < ranks; j++)
            h[i * h_stride + j] = scales[i] * sum_lanes(sums[i][j]);
}

#define DOT(DTYPE, ROWS)                                                                        \
    if (rows == ROWS && ranks == TILE_RANKS)                                                    \
        dot_tile(DTYPE, ROWS, TILE_RANKS, x, a, a_stride, in_features, scales, h, h_stride);    \
    else if (rows == ROWS)                                                                      \
        dot_tile(DTYPE, ROWS, 1, x, a, a_stride, in_features, scales, h, h_stride);
#define DEFINE_DOTS(DTYPE)                                                                                       \
    static void dots_##DTYPE(int rows, int ranks, const char *const *x, const char *a, size_t a_stride,          \
                             size_t in_features, const float *scales, float *h, size_t h_stride) {               \
        TILES_OF(DOT, DTYPE)                                                                                     \
    }

/* y += h B */

/* Adds to sums [rows, COLUMNS] the products of `rows` rows of h with B; `is_first`: a row's sums begin here. */
INLINE void product_tile(int dtype, int rows, const float *h, size_t rank, const char *b, size_t b_stride,
                         float *const *sums, const uint8_t *is_first) {
    f32 columns[TILE_ROWS][4];
#pragma GCC unroll 4
    for (int i = 0; i < rows; i++) {
        if (is_first[i])
            memset(columns[i], 0, sizeof columns[i]);
        else
            memcpy(columns[i], sums[i], sizeof columns[i]);
    }
    for (size_t r = 0; r < rank; r++, b += b_stride) {
        f32 in_b[4];
        load_pair(dtype, b, in_b);
        load_pair(dtype, b + PAIR * item_bytes(dtype), in_b + 2);
#pragma GCC unroll 4
        for (int i = 0; i < rows; i++) {
            f32 factor = same(h[i * rank + r]);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++)
                columns[i][j] += factor * in_b[j];
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < rows; i++)
        memcpy(sums[i], columns[i], sizeof columns[i]);
}

#define PRODUCT(DTYPE, ROWS)                                            \
    if (rows == ROWS)                                                   \
        product_tile(DTYPE, ROWS, h, rank, b, b_stride, sums, is_first);
#define DEFINE_PRODUCTS(DTYPE)                                                                             \
    static void products_##DTYPE(int rows, const float *h, size_t rank, const char *b, size_t b_stride,    \
                                 float *const *sums, const uint8_t *is_first) {                            \
        TILES_OF(PRODUCT, DTYPE)                                                                           \
    }

#if TILE_ROWS == 4
#define TILES_OF(TILE, DTYPE) TILE(DTYPE, 1) TILE(DTYPE, 2) TILE(DTYPE, 3) TILE(DTYPE, 4)
#else
#define TILES_OF(TILE, DTYPE) TILE(DTYPE, 1) TILE(DTYPE, 2)
#endif
#define DEFINE(DTYPE) DEFINE_DOTS(DTYPE) DEFINE_PRODUCTS(DTYPE)
DEFINE(FLOAT32)
DEFINE(FLOAT16)
DEFINE(BFLOAT16)

typedef void dots_function(int, int, const char *const *, const char *, size_t, size_t, const float *, float *, size_t);
typedef void products_function(int, const float *, size_t, const char *, size_t, float *const *, const uint8_t *);
static dots_function *const DOTS[] = {dots_FLOAT32, dots_FLOAT16, dots_BFLOAT16};
static products_function *const PRODUCTS[] = {products_FLOAT32, products_FLOAT16, products_BFLOAT16};

/* As even as can be: five rows are three and two. */
INLINE size_t tile_rows(size_t left) {
    size_t tiles = (left + TILE_ROWS - 1) / TILE_ROWS;
    return (left + tiles - 1) / tiles;
}

/* Which of `threads` does a piece of work, by the cost of what comes before it. */
INLINE size_t owner(size_t before, size_t cost, size_t threads, size_t total) {
    return (2 * before + cost) * threads / (2 * total + 1);
}

/* Ranks [first, last) of one unit. */
static void dot_unit(const Call *call, const Unit *unit, const Factors *factors, size_t first, size_t last, float *h) {
    const Layer *layer = call->layer;
    const uint32_t *rows = call->step->rows + unit->first;
    const float *coefficients = call->step->coefficients + unit->first;
    const size_t bytes = item_bytes(layer->dtype), stride = factors->a_stride * bytes;
    for (size_t i = 0; i < unit->count;) {
        size_t count = tile_rows(unit->count - i);
        const char *x[TILE_ROWS];
        float scales[TILE_ROWS];
        for (size_t k = 0; k < count; k++) {
            x[k] = call->x + rows[i + k] * call->x_stride;
            scales[k] = coefficients[i + k] * factors->scaling;
        }
        for (size_t r = first; r < last;) {
            size_t ranks = last - r < TILE_RANKS ? 1 : TILE_RANKS;
            DOTS[layer->dtype](count, ranks, x, factors->a + r * stride, stride, layer->in_features, scales,
                               h + i * factors->rank + r, factors->rank);
            r += ranks;
        }
        i += count;
    }
}

static void look_up_unit(const Call *call, const Unit *unit, const Factors *factors, size_t first, size_t last,
                         float *h) {
    const Layer *layer = call->layer;
    for (size_t i = 0; i < unit->count; i++) {
        const char *at = call->x + call->step->rows[unit->first + i] * call->x_stride;
        int64_t id;
        if (call->x_stride == 4) {
            int32_t narrow;
            memcpy(&narrow, at, 4);
            id = narrow;
        } else {
            memcpy(&id, at, 8);
        }
        const int is_known = id >= 0 && (size_t)id < layer->in_features;
        const char *from = factors->a + (is_known ? id * factors->a_stride * item_bytes(layer->dtype) : 0);
        const float scale = call->step->coefficients[unit->first + i] * factors->scaling;
        for (size_t r = first; r < last; r++)
            h[i * factors->rank + r] =
                is_known ? scale * load_one(layer->dtype, from + r * item_bytes(layer->dtype)) : 0;
    }
}

/* All of h that this thread owns. */
static void first_phase(const Call *call, size_t thread, size_t threads) {
    const Layer *layer = call->layer;
    float *h = call->step->h;
    size_t before = 0;
    for (size_t u = 0; u < call->step->num_units; u++) {
        const Unit *unit = &call->step->units[u];
        for (size_t s = 0; s < layer->num_slices; s++) {
            const Factors *factors = factors_of(layer, unit, s);
            /* the ranks whose owner this thread is lie together */
            size_t first = factors->rank, last = 0;
            for (size_t r = 0; r < factors->rank; r += TILE_RANKS) {
                size_t ranks = smaller(TILE_RANKS, factors->rank - r), cost = unit->count * ranks;
                if (owner(before, cost, threads, call->h_cost) == thread) {
                    first = smaller(first, r);
                    last = r + ranks;
                }
                before += cost;
            }
            if (first < last)
                (layer->is_embedding ? look_up_unit : dot_unit)(call, unit, factors, first, last, h);
            h += unit->count * factors->rank;
        }
    }
}

/* Columns [from, from + count) of y in one slice and one block of rows, count <= COLUMNS. `units` are the block's. */
static void product_block(const Call *call, const Unit *units, const Unit *end, const float *h, size_t slice,
                          size_t from, size_t count) {
    const Layer *layer = call->layer;
    const size_t bytes = item_bytes(layer->dtype), first_row = units->block * BLOCK;
    float sums[BLOCK][COLUMNS] __attribute__((aligned(64)));
    uint8_t is_summed[BLOCK] = {0};
    for (const Unit *unit = units; unit < end; unit++) {
        const uint32_t *rows = call->step->rows + unit->first;
        for (size_t s = 0; s < slice; s++)
            h += unit->count * factors_of(layer, unit, s)->rank;
        const Factors *factors = factors_of(layer, unit, slice);
        for (size_t i = 0; factors->rank && i < unit->count;) {
            size_t tile = tile_rows(unit->count - i);
            float *pointers[TILE_ROWS];
            uint8_t is_first[TILE_ROWS];
            for (size_t k = 0; k < tile; k++) {
                size_t row = rows[i + k] - first_row;
                pointers[k] = sums[row];
                is_first[k] = !is_summed[row];
                is_summed[row] = 1;
            }
            PRODUCTS[layer->dtype](tile, h + i * factors->rank, factors->rank, factors->b + from * bytes,
                                   factors->b_stride * bytes, pointers, is_first);
            i += tile;
        }
        for (size_t s = slice; s < layer->num_slices; s++)
            h += unit->count * factors_of(layer, unit, s)->rank;
    }
    char *y = call->y + (layer->slices[slice].offset + from) * bytes;
    for (size_t row = 0; row < BLOCK; row++) {
        if (!is_summed[row])
            continue;
        char *at = y + (first_row + row) * call->y_stride;
        for (size_t column = 0; column < count; column += PAIR) {
            const size_t size = smaller(PAIR, count - column) * bytes;
            f32 pair[2], sum[2];
            char copy[4 * PAIR] = {0};
            char *to = size == PAIR * bytes ? at + column * bytes : memcpy(copy, at + column * bytes, size);
            load_pair(layer->dtype, to, pair);
            memcpy(sum, &sums[row][column], sizeof sum);
            pair[0] += sum[0];
            pair[1] += sum[1];
            store_pair(layer->dtype, pair, to);
            if (to == copy)
                memcpy(at + column * bytes, copy, size);
        }
    }
}

static void second_phase(const Call *call, size_t thread, size_t threads) {
    const Layer *layer = call->layer;
    const Unit *const end = call->step->units + call->step->num_units;
    const float *h = call->step->h;
    size_t before = 0;
    for (const Unit *units = call->step->units, *next; units < end; units = next) {
        size_t h_size = 0;
        for (next = units; next < end && next->block == units->block; next++)
            for (size_t s = 0; s < layer->num_slices; s++)
                h_size += next->count * factors_of(layer, next, s)->rank;
        for (size_t s = 0; s < layer->num_slices && h_size; s++) {
            const size_t width = layer->slices[s].width;
            size_t cost = 0;
            for (const Unit *unit = units; unit < next; unit++)
                cost += unit->count * factors_of(layer, unit, s)->rank;
            for (size_t from = 0; from < width && cost; from += COLUMNS, before += cost)
                if (owner(before, cost, threads, call->y_cost) == thread)
                    product_block(call, units, next, h, s, from, smaller(COLUMNS, width - from));
        }
        h += h_size;
    }
}

static void in_a_thread(void *data) {
    const Call *call = data;
    const size_t thread = runtime.thread(), threads = runtime.num_threads();
    first_phase(call, thread, threads);
    runtime.barrier();
    second_phase(call, thread, threads);
}

/* What Python calls. Sizes and strides are in elements. */

size_t cocktail_columns(void) { return COLUMNS; }

void cocktail_set_runtime(void *parallel, void *barrier, void *num_threads, void *thread, void *max_threads) {
    runtime.parallel = parallel;
    runtime.barrier = barrier;
    runtime.num_threads = num_threads;
    runtime.thread = thread;
    runtime.max_threads = max_threads;
}

void cocktail_free_layer(Layer *layer) {
    if (layer) {
        free(layer->slices);
        free(layer->factors);
    }
    free(layer);
}

Layer *cocktail_new_layer(int dtype, int is_embedding, size_t in_features, size_t num_slices, const size_t *widths) {
    Layer *layer = calloc(1, sizeof *layer);
    if (!layer)
        return NULL;
    *layer = (Layer){.dtype = dtype, .is_embedding = is_embedding, .in_features = in_features, .num_slices = num_slices};
    layer->slices = calloc(num_slices, sizeof *layer->slices);
    if (!layer->slices) {
        free(layer);
        return NULL;
    }
    for (size_t s = 0, offset = 0; s < num_slices; offset += widths[s++])
        layer->slices[s] = (Slice){offset, widths[s]};
    return layer;
}

/* -1 without memory. */
int cocktail_set_factors(Layer *layer, size_t expert, size_t slice, const char *a, size_t a_stride, const char *b,
                         size_t b_stride, size_t rank, float scaling) {
    if (expert >= layer->num_experts) {
        Factors *grown = realloc(layer->factors, (expert + 1) * layer->num_slices * sizeof *grown);
        if (!grown)
            return -1;
        memset(grown + layer->num_experts * layer->num_slices, 0,
               (expert + 1 - layer->num_experts) * layer->num_slices * sizeof *grown);
        layer->factors = grown;
        layer->num_experts = expert + 1;
    }
    layer->factors[expert * layer->num_slices + slice] = (Factors){a, b, rank, a_stride, b_stride, scaling};
    return 0;
}

void cocktail_free_step(Step *step) {
    if (step) {
        free(step->units);
        free(step->rows);
        free(step->coefficients);
        free(step->h);
    }
    free(step);
}

Step *cocktail_new_step(void) { return calloc(1, sizeof(Step)); }

/* Room for `size` items; what was there is lost. */
static int grow(void *pointer, size_t *capacity, size_t size, size_t bytes) {
    void **array = pointer;
    if (size <= *capacity)
        return 0;
    free(*array);
    *capacity = 0;
    *array = malloc(2 * size * bytes);
    if (!*array)
        return -1;
    *capacity = 2 * size;
    return 0;
}

/* Lays out the rows of a step: `lengths[i]` rows with the coefficients [num_experts] of request i, one request after
 * the other. -1 without memory: the step is then empty. */
int cocktail_set_step(Step *step, const float *coefficients, size_t num_requests, size_t num_experts,
                      const int32_t *lengths) {
    size_t num_rows = 0, num_pairs = 0;
    for (size_t i = 0; i < num_requests; i++) {
        size_t used = 0;
        for (size_t e = 0; e < num_experts; e++)
            used += coefficients[i * num_experts + e] != 0;
        num_rows += lengths[i];
        num_pairs += used * lengths[i];
    }
    step->num_rows = step->num_units = step->num_pairs = 0;
    const size_t num_blocks = (num_rows + BLOCK - 1) / BLOCK;
    size_t rows_capacity = step->pair_capacity;
    if (grow(&step->units, &step->unit_capacity, smaller(num_blocks * num_experts, num_pairs), sizeof(Unit)) ||
        grow(&step->rows, &rows_capacity, num_pairs, sizeof(uint32_t)) ||
        grow(&step->coefficients, &step->pair_capacity, num_pairs, sizeof(float)))
        return -1;
    size_t first_request = 0, begin = 0; /* of the block, and that request's first row */
    for (size_t block = 0; block < num_blocks; block++) {
        const size_t from = block * BLOCK, to = smaller(num_rows, from + BLOCK);
        while (begin + lengths[first_request] <= from)
            begin += lengths[first_request++];
        for (size_t e = 0; e < num_experts; e++) {
            Unit unit = {e, block, step->num_pairs, 0};
            for (size_t i = first_request, row = begin; row < to; row += lengths[i++]) {
                const float coefficient = coefficients[i * num_experts + e];
                const size_t last = smaller(to, row + lengths[i]);
                for (size_t t = row < from ? from : row; coefficient != 0 && t < last; t++) {
                    step->rows[unit.first + unit.count] = t;
                    step->coefficients[unit.first + unit.count++] = coefficient;
                }
            }
            if (unit.count)
                step->units[step->num_units++] = unit;
            step->num_pairs += unit.count;
        }
    }
    step->num_rows = num_rows;
    return 0;
}

/* Adds to the first rows of y, as many as the step has. x is int32 or int64 ids for an embedding, and x_stride then
 * their size in bytes. -1 without memory, y is then as it was. */
int cocktail_add(Step *step, const Layer *layer, const char *x, size_t x_stride, char *y, size_t y_stride) {
    Call call = {.step = step, .layer = layer, .x = x, .y = y};
    const size_t bytes = item_bytes(layer->dtype);
    call.x_stride = layer->is_embedding ? x_stride : x_stride * bytes;
    call.y_stride = y_stride * bytes;
    for (size_t u = 0; u < step->num_units; u++) {
        for (size_t s = 0; s < layer->num_slices; s++) {
            const size_t cost = step->units[u].count * factors_of(layer, &step->units[u], s)->rank;
            call.h_cost += cost;
            call.y_cost += cost * ((layer->slices[s].width + COLUMNS - 1) / COLUMNS);
        }
    }
    if (!call.h_cost)
        return 0;
    if (grow(&step->h, &step->h_capacity, call.h_cost, sizeof(float)))
        return -1;
    const size_t products = call.h_cost * (layer->is_embedding ? 1 : layer->in_features) + call.y_cost * COLUMNS;
    if (runtime.parallel && products > ALONE && runtime.max_threads() > 1) {
        runtime.parallel(in_a_thread, &call, 0, 0);
    } else {
        first_phase(&call, 0, 1);
        second_phase(&call, 0, 1);
    }
    return 0;
}
