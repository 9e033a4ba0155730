/* y += ((x A) * c) B for the rows of a step: LoRA factors of many experts, each row with coefficients of its own.
 *
 * h = c * scaling * (x A) is summed in float32 from x and A as they are, in an order that hangs on in_features alone,
 * and kept in float32; the sum over h and B is float32 again, expert by expert and rank by rank; y is read, added to
 * and rounded once, to nearest even. So a row's result hangs on nothing but the row. What has a coefficient of zero is
 * not read, and a row that has no other coefficient is not written. Where the machine has AVX512-BF16, products of
 * bfloat16 are summed in pairs, and its subnormal numbers count as zero, in x and A and in the result.
 *
 * Factors may be in no cache: a model has more than caches hold, and its other weights pass through them. They lie in
 * the order in which they are read, and what comes next is fetched ahead.
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
#define TILE_ROWS 6 /* rows of x that one tile multiplies */
#elif defined(__AVX__)
#define LANES 8
#define TILE_ROWS 2
#else
#define LANES 4
#define TILE_ROWS 4
#endif
#define TILE_RANKS 4       /* rows of A that one tile multiplies them with */
#define PAIR (2 * LANES)   /* elements that are loaded at once */
#define COLUMNS (2 * PAIR) /* of B in one tile; one or two tiles are multiplied at once */
#define BLOCK 64           /* rows that use a part of B while the first cache holds it */
#define CACHED (24 * 1024) /* bytes of that part */
#define ALONE (256 * 1024) /* products in a call below which waking other threads costs more than it gains */

typedef float f32 __attribute__((vector_size(4 * LANES)));
typedef uint32_t u32 __attribute__((vector_size(4 * LANES)));
typedef int32_t i32 __attribute__((vector_size(4 * LANES)));
typedef uint16_t u16 __attribute__((vector_size(2 * LANES)));

#define INLINE static inline __attribute__((always_inline))

INLINE size_t smaller(size_t a, size_t b) { return a < b ? a : b; }
INLINE size_t item_bytes(int dtype) { return dtype == FLOAT32 ? 4 : 2; }

INLINE f32 load_float16(const char *from) {
#if defined(__AVX512F__)
    return (f32)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from));
#elif defined(__F16C__)
    return (f32)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from));
#elif defined(__ARM_NEON)
    return (f32)vcvt_f32_f16(vld1_f16((const __fp16 *)from));
#else
    _Float16 halves[LANES];
    f32 value = {0};
    memcpy(halves, from, sizeof halves);
    for (int i = 0; i < LANES; i++)
        value[i] = (float)halves[i];
    return value;
#endif
}

INLINE f32 load(int dtype, const char *from) {
    if (dtype == FLOAT32) {
        f32 value;
        memcpy(&value, from, sizeof value);
        return value;
    }
    if (dtype == FLOAT16)
        return load_float16(from);
    u16 halves;
    memcpy(&halves, from, sizeof halves);
    return (f32)(__builtin_convertvector(halves, u32) << 16);
}

/* PAIR elements are two vectors: one after the other, but of bfloat16 the even elements and the odd ones. These are the
 * lower and upper halves of words, floats once they are shifted or masked, and nothing is shuffled. B is stored so that
 * this brings its columns in order. */
INLINE f32 load_half(int dtype, const char *from, int half) {
    if (dtype != BFLOAT16)
        return load(dtype, from + half * LANES * item_bytes(dtype));
    u32 words;
    memcpy(&words, from, sizeof words);
    return (f32)(half ? words & 0xffff0000 : words << 16);
}

/* Both halves. gcc would load words twice, and loads are what a product waits for. */
INLINE void load_pair(int dtype, const char *from, f32 pair[2]) {
    if (dtype != BFLOAT16) {
        pair[0] = load_half(dtype, from, 0);
        pair[1] = load_half(dtype, from, 1);
        return;
    }
    u32 words;
    memcpy(&words, from, sizeof words);
#ifdef __AVX512F__
    __asm__("" : "+v"(words));
#endif
    pair[0] = (f32)(words << 16);
    pair[1] = (f32)(words & 0xffff0000);
}

INLINE void store_float16(f32 value, char *to) {
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i *)to, _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
    _mm_storeu_si128((__m128i *)to, _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__ARM_NEON)
    vst1_f16((__fp16 *)to, vcvt_f16_f32((float32x4_t)value));
#else
    _Float16 halves[LANES];
    for (int i = 0; i < LANES; i++)
        halves[i] = (_Float16)value[i];
    memcpy(to, halves, sizeof halves);
#endif
}

/* To nearest even; a NaN stays one. */
INLINE void store_bfloat16(f32 value, char *to) {
#if defined(__AVX512F__) && defined(__AVX512BF16__)
    const __m256bh rounded = _mm512_cvtneps_pbh((__m512)value);
    memcpy(to, &rounded, sizeof rounded);
#else
    const u32 bits = (u32)value, is_nan = (u32)(value != value);
    const u32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const u16 halves = __builtin_convertvector((is_nan & 0x7fc0) | (~is_nan & rounded), u16);
    memcpy(to, &halves, sizeof halves);
#endif
}

INLINE void store(int dtype, f32 value, char *to) {
    if (dtype == FLOAT32)
        memcpy(to, &value, sizeof value);
    else if (dtype == FLOAT16)
        store_float16(value, to);
    else
        store_bfloat16(value, to);
}

INLINE float load_one(int dtype, const char *from) {
    uint32_t bits = 0;
    float value;
    if (dtype == FLOAT16) {
        char copy[2 * LANES] = {0};
        memcpy(copy, from, 2);
        return load_float16(copy)[0];
    }
    if (dtype == FLOAT32) {
        memcpy(&bits, from, 4);
    } else {
        uint16_t half;
        memcpy(&half, from, 2);
        bits = (uint32_t)half << 16;
    }
    memcpy(&value, &bits, 4);
    return value;
}

INLINE f32 same(float value) { return value - (f32){0}; }

/* The sum of each of four vectors. */
INLINE void sum_lanes(const f32 sums[TILE_RANKS], float *to) {
#ifdef __AVX512F__
    __m512 a = (__m512)sums[0], b = (__m512)sums[1], c = (__m512)sums[2], d = (__m512)sums[3];
    __m512d ab = (__m512d)_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    __m512d cd = (__m512d)_mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    __m512 parts = _mm512_add_ps((__m512)_mm512_unpacklo_pd(ab, cd), (__m512)_mm512_unpackhi_pd(ab, cd));
    __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(parts),
                                  (__m256)_mm512_extractf64x4_pd((__m512d)parts, 1));
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
#else
    for (int j = 0; j < TILE_RANKS; j++) {
        float lanes[LANES];
        memcpy(lanes, &sums[j], sizeof lanes);
        for (int half = LANES / 2; half; half /= 2)
            for (int i = 0; i < half; i++)
                lanes[i] += lanes[i + half];
        to[j] = lanes[0];
    }
#endif
}

/* What a layer and a step are. */

typedef struct {
    /* [rank / TILE_RANKS, in_features / PAIR, TILE_RANKS, PAIR], each rounded up and filled with zeros: as a tile reads
     * it; of an embedding [in_features, rank] */
    const char *a;
    const char *b; /* [width / COLUMNS, rank, COLUMNS] likewise; of bfloat16 each PAIR as [LANES, 2] */
    size_t rank;
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
    uint64_t rows; /* a bit for each row of the block */
} Unit;

/* A unit that a row takes part in, and the row's place among the unit's. */
typedef struct {
    uint32_t unit, place;
} Use;

/* A unit's part in one slice of a layer. */
typedef struct {
    const Unit *unit;
    const Factors *factors;
    float *h; /* [count, h_stride] */
    size_t h_stride;
} Part;

/* One slice of one block of rows. */
typedef struct {
    size_t slice, block, first, end, cost; /* units [first, end); cost of one tile of columns */
    uint64_t rows;                         /* those that get something */
} Group;

typedef struct {
    size_t num_units;
    size_t unit_capacity, row_capacity, coefficient_capacity, use_capacity, begin_capacity;
    size_t part_capacity, group_capacity, h_capacity;
    Unit *units;         /* by block, then by expert */
    uint32_t *rows;      /* of each unit in turn, ascending */
    float *coefficients; /* beside them */
    Use *uses;           /* of each row in turn, ascending */
    size_t *begins;      /* [num_rows + 1], of each row's uses */
    Part *parts;         /* of a call: [num_units, num_slices] */
    Group *groups;
    float *h;
} Step;

typedef struct {
    const Step *step;
    const Layer *layer;
    const char *x;
    char *y;
    size_t x_stride, y_stride; /* in bytes; an embedding's x_stride is the size of an id */
    size_t num_groups, h_cost, y_cost;
} Call;

static struct {
    void (*parallel)(void (*function)(void *), void *data, unsigned num_threads, unsigned flags);
    void (*barrier)(void);
    int (*num_threads)(void);
    int (*thread)(void);
    int (*max_threads)(void);
} runtime;

INLINE size_t tiles_of(size_t size, size_t tile) { return (size + tile - 1) / tile; }

/* As even as can be: seven rows are four and three. */
INLINE size_t tile_rows(size_t left) {
    size_t tiles = tiles_of(left, TILE_ROWS);
    return tiles_of(left, tiles);
}

/* TILE of as many rows, a constant in each. */
#if TILE_ROWS == 6
#define FOR_ROWS(COUNT, TILE)    \
    switch (COUNT) {             \
        case 1: TILE(1); break;  \
        case 2: TILE(2); break;  \
        case 3: TILE(3); break;  \
        case 4: TILE(4); break;  \
        case 5: TILE(5); break;  \
        case 6: TILE(6); break;  \
    }
#elif TILE_ROWS == 4
#define FOR_ROWS(COUNT, TILE)    \
    switch (COUNT) {             \
        case 1: TILE(1); break;  \
        case 2: TILE(2); break;  \
        case 3: TILE(3); break;  \
        case 4: TILE(4); break;  \
    }
#else
#define FOR_ROWS(COUNT, TILE)    \
    switch (COUNT) {             \
        case 1: TILE(1); break;  \
        case 2: TILE(2); break;  \
    }
#endif

/* h = c * scaling * (x A) */

/* Adds PAIR products of each row of x with each of TILE_RANKS rows of A. */
INLINE void dot_step(int dtype, int rows, const char *const *x, size_t at, const char *a,
                     f32 sums[TILE_ROWS][TILE_RANKS]) {
#if defined(__AVX512F__) && defined(__AVX512BF16__)
    if (dtype == BFLOAT16) {
        __m512bh in_a[TILE_RANKS];
#pragma GCC unroll 4
        for (int j = 0; j < TILE_RANKS; j++)
            in_a[j] = (__m512bh)_mm512_loadu_si512(a + j * 64);
#pragma GCC unroll 6
        for (int i = 0; i < rows; i++) {
            __m512bh in_x = (__m512bh)_mm512_loadu_si512(x[i] + at);
#pragma GCC unroll 4
            for (int j = 0; j < TILE_RANKS; j++)
                sums[i][j] = (f32)_mm512_dpbf16_ps((__m512)sums[i][j], in_x, in_a[j]);
        }
        return;
    }
#endif
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
        f32 in_a[TILE_RANKS];
#pragma GCC unroll 4
        for (int j = 0; j < TILE_RANKS; j++)
            in_a[j] = load_half(dtype, a + j * PAIR * item_bytes(dtype), half);
#pragma GCC unroll 6
        for (int i = 0; i < rows; i++) {
            f32 in_x = load_half(dtype, x[i] + at, half);
#pragma GCC unroll 4
            for (int j = 0; j < TILE_RANKS; j++)
                sums[i][j] += in_x * in_a[j];
        }
    }
}

/* h [rows, TILE_RANKS] of `rows` rows of x and one tile of A. */
INLINE void dot_tile(int dtype, int rows, const char *const *x, const char *a, const char *ahead, size_t in_features,
                     const float *scales, float *h, size_t h_stride) {
    const size_t bytes = PAIR * item_bytes(dtype), whole = in_features / PAIR * bytes;
    const size_t rest = in_features * item_bytes(dtype) - whole;
    f32 sums[TILE_ROWS][TILE_RANKS];
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < TILE_RANKS; j++)
            sums[i][j] = (f32){0};
    for (size_t at = 0; at < whole; at += bytes, a += TILE_RANKS * bytes, ahead += TILE_RANKS * bytes) {
        for (size_t line = 0; line < TILE_RANKS * bytes; line += 64)
            __builtin_prefetch(ahead + line);
        dot_step(dtype, rows, x, at, a, sums);
    }
    if (rest) {
        char ends[TILE_ROWS][4 * PAIR] = {{0}};
        const char *pointers[TILE_ROWS];
        for (int i = 0; i < rows; i++) {
            memcpy(ends[i], x[i] + whole, rest);
            pointers[i] = ends[i];
        }
        dot_step(dtype, rows, pointers, 0, a, sums);
    }
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++) {
        float *to = h + i * h_stride;
        sum_lanes(sums[i], to);
        for (int j = 0; j < TILE_RANKS; j++)
            to[j] *= scales[i];
    }
}

/* Tiles [first, last) of one part's ranks. */
INLINE void dot_part(int dtype, const Call *call, const Part *part, size_t first, size_t last) {
    const size_t in_features = call->layer->in_features, h_stride = part->h_stride;
    const size_t bytes = tiles_of(in_features, PAIR) * PAIR * TILE_RANKS * item_bytes(dtype);
    const uint32_t *rows = call->step->rows + part->unit->first;
    const float *coefficients = call->step->coefficients + part->unit->first;
    const char *const next = part + 1 < call->step->parts + call->step->num_units * call->layer->num_slices
                                 ? part[1].factors->a : NULL;
    for (size_t tile = first; tile < last; tile++) {
        const char *a = part->factors->a + tile * bytes, *ahead = tile + 1 < last ? a + bytes : next;
        for (size_t i = 0, count; i < part->unit->count; i += count) {
            const char *x[TILE_ROWS];
            float scales[TILE_ROWS], *h = part->h + i * h_stride + tile * TILE_RANKS;
            count = tile_rows(part->unit->count - i);
            for (size_t k = 0; k < count; k++) {
                x[k] = call->x + rows[i + k] * call->x_stride;
                scales[k] = coefficients[i + k] * part->factors->scaling;
            }
#define DOT(ROWS) dot_tile(dtype, ROWS, x, a, ahead, in_features, scales, h, h_stride)
            FOR_ROWS(count, DOT)
        }
    }
}

/* y += h B */

/* to [size] += sums, rounded once. */
INLINE void add_rounded(int dtype, int count, const f32 *sums, char *to, size_t size) {
    const size_t bytes = item_bytes(dtype);
    char copy[2 * COLUMNS * 4], *at = to;
    if (size < (size_t)count * LANES) {
        memset(copy, 0, sizeof copy);
        at = memcpy(copy, to, size * bytes);
    }
#pragma GCC unroll 8
    for (int i = 0; i < count; i++)
        store(dtype, load(dtype, at + i * LANES * bytes) + sums[i], at + i * LANES * bytes);
    if (at == copy)
        memcpy(to, copy, size * bytes);
}

/* One or two tiles of a group's columns. The sums of a row stay in registers over all experts whose tiles of B the
 * first cache holds together. A unit's rows fetch the next tiles of B, each some of them. */
INLINE void product_tiles(int dtype, int tiles, const Call *call, const Group *group, size_t tile) {
    const Step *step = call->step;
    const Slice *slice = &call->layer->slices[group->slice];
    const size_t bytes = COLUMNS * item_bytes(dtype), first_row = group->block * BLOCK;
    const Part *parts = step->parts + group->slice;
    char *const y = call->y + slice->offset * item_bytes(dtype) + tile * bytes;
    const Use *next[BLOCK];
    f32 sums[BLOCK][8];
    for (size_t begin = group->first, end; begin < group->end; begin = end) {
        size_t ranks = parts[begin * call->layer->num_slices].factors->rank;
        for (end = begin + 1; end < group->end; end++) {
            ranks += parts[end * call->layer->num_slices].factors->rank;
            if (ranks * tiles * bytes > CACHED)
                break;
        }
        for (uint64_t left = group->rows; left; left &= left - 1) {
            const int row = __builtin_ctzll(left);
            const Use *use = step->uses + step->begins[first_row + row];
            const Use *const last = step->uses + step->begins[first_row + row + 1];
            f32 columns[8];
            if (begin == group->first) {
#pragma GCC unroll 8
                for (int j = 0; j < 4 * tiles; j++)
                    columns[j] = (f32){0};
            } else {
                use = next[row];
#pragma GCC unroll 8
                for (int j = 0; j < 4 * tiles; j++)
                    columns[j] = sums[row][j];
            }
            for (; use < last && use->unit < end; use++) {
                const Part *part = parts + use->unit * call->layer->num_slices;
                const size_t rank = part->factors->rank;
                const float *h = part->h + use->place * part->h_stride, *const h_end = h + rank;
                const char *b = part->factors->b + tile * rank * bytes;
                for (size_t r = use->place; r < rank; r += part->unit->count)
                    for (size_t line = 0; line < tiles * bytes; line += 64)
                        __builtin_prefetch(b + (tiles * rank + r * tiles) * bytes + line);
                for (; h < h_end; h++, b += bytes) {
                    const f32 factor = same(*h);
#pragma GCC unroll 8
                    for (int j = 0; j < 4 * tiles; j += 2) {
                        f32 in_b[2];
                        load_pair(dtype, b + j / 4 * rank * bytes + j % 4 / 2 * (bytes / 2), in_b);
                        columns[j] += factor * in_b[0];
                        columns[j + 1] += factor * in_b[1];
                    }
                }
            }
            if (end < group->end) {
                next[row] = use;
#pragma GCC unroll 8
                for (int j = 0; j < 4 * tiles; j++)
                    sums[row][j] = columns[j];
            } else {
                char *to = y + (first_row + row) * call->y_stride;
                add_rounded(dtype, 4 * tiles, columns, to, smaller(tiles * COLUMNS, slice->width - tile * COLUMNS));
            }
        }
    }
}

#define DEFINE(DTYPE)                                                                                         \
    static void dot_##DTYPE(const Call *call, const Part *part, size_t first, size_t last) {                  \
        dot_part(DTYPE, call, part, first, last);                                                             \
    }                                                                                                         \
    static void product_##DTYPE(int tiles, const Call *call, const Group *group, size_t tile) {               \
        if (tiles == 1)                                                                                       \
            product_tiles(DTYPE, 1, call, group, tile);                                                       \
        else                                                                                                  \
            product_tiles(DTYPE, 2, call, group, tile);                                                       \
    }
DEFINE(FLOAT32)
DEFINE(FLOAT16)
DEFINE(BFLOAT16)

static void (*const DOTS[])(const Call *, const Part *, size_t, size_t) = {dot_FLOAT32, dot_FLOAT16, dot_BFLOAT16};
static void (*const PRODUCTS[])(int, const Call *, const Group *, size_t) = {
    product_FLOAT32, product_FLOAT16, product_BFLOAT16};

/* Which of `threads` does a piece of work, by the cost of what comes before it. */
INLINE size_t owner(size_t before, size_t cost, size_t threads, size_t total) {
    return (2 * before + cost) * threads / (2 * total + 1);
}

static void look_up_part(const Call *call, const Part *part, size_t first, size_t last) {
    const Layer *layer = call->layer;
    const Factors *factors = part->factors;
    const size_t h_stride = part->h_stride, end = smaller(factors->rank, last * TILE_RANKS);
    for (size_t i = 0; i < part->unit->count; i++) {
        const char *at = call->x + call->step->rows[part->unit->first + i] * call->x_stride;
        int64_t id;
        if (call->x_stride == 4) {
            int32_t narrow;
            memcpy(&narrow, at, 4);
            id = narrow;
        } else {
            memcpy(&id, at, 8);
        }
        const int is_known = id >= 0 && (size_t)id < layer->in_features;
        const char *from = factors->a + (is_known ? id * factors->rank * item_bytes(layer->dtype) : 0);
        const float scale = call->step->coefficients[part->unit->first + i] * factors->scaling;
        for (size_t r = first * TILE_RANKS; r < end; r++)
            part->h[i * h_stride + r] =
                is_known ? scale * load_one(layer->dtype, from + r * item_bytes(layer->dtype)) : 0;
    }
}

/* All of h that this thread owns. */
static void first_phase(const Call *call, size_t thread, size_t threads) {
    size_t before = 0;
    const Part *end = call->step->parts + call->step->num_units * call->layer->num_slices;
    for (const Part *part = call->step->parts; part < end; part++) {
        const size_t tiles = tiles_of(part->factors->rank, TILE_RANKS);
        size_t first = tiles, last = 0; /* the tiles that a thread owns lie together */
        for (size_t tile = 0; tile < tiles; tile++, before += part->unit->count)
            if (owner(before, part->unit->count, threads, call->h_cost) == thread) {
                first = smaller(first, tile);
                last = tile + 1;
            }
        if (first < last)
            (call->layer->is_embedding ? look_up_part : DOTS[call->layer->dtype])(call, part, first, last);
    }
}

static void second_phase(const Call *call, size_t thread, size_t threads) {
    size_t before = 0;
    for (const Group *group = call->step->groups, *end = group + call->num_groups; group < end; group++) {
        const size_t tiles = tiles_of(call->layer->slices[group->slice].width, COLUMNS);
        size_t first = tiles, last = 0; /* the tiles that a thread owns lie together */
        for (size_t tile = 0; tile < tiles; tile++, before += group->cost)
            if (owner(before, group->cost, threads, call->y_cost) == thread) {
                first = smaller(first, tile);
                last = tile + 1;
            }
        for (size_t tile = first; tile < last; tile += 2)
            PRODUCTS[call->layer->dtype](smaller(2, last - tile), call, group, tile);
    }
}

static void in_a_thread(void *data) {
    const Call *call = data;
    const size_t thread = runtime.thread(), threads = runtime.num_threads();
    first_phase(call, thread, threads);
    runtime.barrier();
    second_phase(call, thread, threads);
}

/* What Python calls. */

/* What factors are stored in: tiles of A, tiles of B, and halves of a pair. */
void cocktail_tile(size_t *ranks, size_t *inputs, size_t *columns, size_t *lanes) {
    *ranks = TILE_RANKS;
    *inputs = PAIR;
    *columns = COLUMNS;
    *lanes = LANES;
}

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
    layer->dtype = dtype;
    layer->is_embedding = is_embedding;
    layer->in_features = in_features;
    layer->num_slices = num_slices;
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
int cocktail_set_factors(Layer *layer, size_t expert, size_t slice, const char *a, const char *b, size_t rank,
                         float scaling) {
    if (expert >= layer->num_experts) {
        Factors *grown = realloc(layer->factors, (expert + 1) * layer->num_slices * sizeof *grown);
        if (!grown)
            return -1;
        memset(grown + layer->num_experts * layer->num_slices, 0,
               (expert + 1 - layer->num_experts) * layer->num_slices * sizeof *grown);
        layer->factors = grown;
        layer->num_experts = expert + 1;
    }
    layer->factors[expert * layer->num_slices + slice] = (Factors){a, b, rank, scaling};
    return 0;
}

void cocktail_free_step(Step *step) {
    if (step) {
        free(step->units);
        free(step->rows);
        free(step->coefficients);
        free(step->uses);
        free(step->begins);
        free(step->parts);
        free(step->groups);
        free(step->h);
    }
    free(step);
}

Step *cocktail_new_step(void) { return calloc(1, sizeof(Step)); }

/* Room for `size` items, twice as many where it was too small; what was there is then lost. */
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
 * the other. How many rows these are; -1 without memory, and the step is then empty; -2 if a length is negative, and
 * the step is then what it was. */
int64_t cocktail_set_step(Step *step, const float *coefficients, size_t num_requests, size_t num_experts,
                      const int32_t *lengths) {
    size_t num_rows = 0, num_uses = 0;
    for (size_t i = 0; i < num_requests; i++) {
        size_t used = 0;
        if (lengths[i] < 0)
            return -2;
        for (size_t e = 0; e < num_experts; e++)
            used += coefficients[i * num_experts + e] != 0;
        num_rows += lengths[i];
        num_uses += used * lengths[i];
    }
    step->num_units = 0;
    const size_t num_blocks = tiles_of(num_rows, BLOCK);
    if (grow(&step->units, &step->unit_capacity, smaller(num_blocks * num_experts, num_uses), sizeof(Unit)) ||
        grow(&step->rows, &step->row_capacity, num_uses, sizeof(uint32_t)) ||
        grow(&step->coefficients, &step->coefficient_capacity, num_uses, sizeof(float)) ||
        grow(&step->uses, &step->use_capacity, num_uses, sizeof(Use)) ||
        grow(&step->begins, &step->begin_capacity, num_rows + 1, sizeof(size_t)))
        return -1;
    size_t first = 0, first_request = 0, begin = 0; /* the first request of a block, and that request's first row */
    for (size_t block = 0; block < num_blocks; block++) {
        const size_t from = block * BLOCK, to = smaller(num_rows, from + BLOCK);
        while (begin + lengths[first_request] <= from)
            begin += lengths[first_request++];
        for (size_t e = 0; e < num_experts; e++) {
            Unit unit = {.expert = e, .block = block, .first = first};
            for (size_t i = first_request, row = begin; row < to; row += lengths[i++]) {
                const float coefficient = coefficients[i * num_experts + e];
                const size_t last = smaller(to, row + lengths[i]);
                for (size_t t = row < from ? from : row; coefficient != 0 && t < last; t++) {
                    step->rows[first] = t;
                    step->coefficients[first++] = coefficient;
                    unit.rows |= (uint64_t)1 << (t - from);
                }
            }
            unit.count = first - unit.first;
            if (unit.count)
                step->units[step->num_units++] = unit;
        }
    }
    memset(step->begins, 0, (num_rows + 1) * sizeof *step->begins);
    for (size_t i = 0; i < num_uses; i++)
        step->begins[step->rows[i] + 1]++;
    for (size_t row = 0; row < num_rows; row++)
        step->begins[row + 1] += step->begins[row];
    for (size_t u = 0; u < step->num_units; u++)
        for (size_t i = 0; i < step->units[u].count; i++)
            step->uses[step->begins[step->rows[step->units[u].first + i]]++] = (Use){u, i};
    for (size_t row = num_rows; row > 0; row--) /* each stands at its end now */
        step->begins[row] = step->begins[row - 1];
    step->begins[0] = 0;
    return num_rows;
}

/* Finds what there is to do: the part of each unit in each slice, its place in h, and the groups. -1 without memory. */
static int lay_out(Call *call, Step *step) {
    static const Factors none;
    const Layer *layer = call->layer;
    const size_t size = step->num_units * layer->num_slices;
    if (grow(&step->parts, &step->part_capacity, size, sizeof(Part)) ||
        grow(&step->groups, &step->group_capacity, size, sizeof(Group)))
        return -1;
    for (size_t first = 0, end; first < step->num_units; first = end) {
        const size_t block = step->units[first].block;
        for (end = first; end < step->num_units && step->units[end].block == block; end++)
            ;
        for (size_t s = 0; s < layer->num_slices; s++) {
            Group group = {.slice = s, .block = block, .first = first, .end = end};
            for (size_t u = first; u < end; u++) {
                const Unit *unit = &step->units[u];
                const int is_there = unit->expert < layer->num_experts;
                const Factors *factors = is_there ? &layer->factors[unit->expert * layer->num_slices + s] : &none;
                const size_t tiles = tiles_of(factors->rank, TILE_RANKS);
                step->parts[u * layer->num_slices + s] = (Part){unit, factors, NULL, tiles * TILE_RANKS};
                group.rows |= factors->rank ? unit->rows : 0;
                group.cost += unit->count * factors->rank;
                call->h_cost += unit->count * tiles;
            }
            call->y_cost += group.cost * tiles_of(layer->slices[s].width, COLUMNS);
            if (group.rows)
                step->groups[call->num_groups++] = group;
        }
    }
    if (grow(&step->h, &step->h_capacity, call->h_cost * TILE_RANKS, sizeof(float)))
        return -1;
    float *h = step->h;
    for (Part *part = step->parts; part < step->parts + size; part++) {
        part->h = h;
        h += part->unit->count * part->h_stride;
    }
    return 0;
}

/* Adds to the first rows of y, as many as the step has. Strides are in elements. x is int32 or int64 ids for an
 * embedding, and x_stride then their size in bytes. -1 without memory, y is then as it was. */
int cocktail_add(Step *step, const Layer *layer, const char *x, size_t x_stride, char *y, size_t y_stride) {
    Call call = {.step = step, .layer = layer, .x = x, .y = y};
    const size_t bytes = item_bytes(layer->dtype);
    call.x_stride = layer->is_embedding ? x_stride : x_stride * bytes;
    call.y_stride = y_stride * bytes;
    if (lay_out(&call, step))
        return -1;
    if (!call.num_groups)
        return 0;
    const size_t products =
        call.h_cost * TILE_RANKS * (layer->is_embedding ? 1 : layer->in_features) + call.y_cost * COLUMNS;
    if (runtime.parallel && products > ALONE && runtime.max_threads() > 1) {
        runtime.parallel(in_a_thread, &call, 0, 0);
    } else {
        first_phase(&call, 0, 1);
        second_phase(&call, 0, 1);
    }
    return 0;
}
