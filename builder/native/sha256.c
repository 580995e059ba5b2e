/* SHA-256 of many streams at once, one in each lane of a vector register: see builder/sha256.py for when and why.
 *
 * A processor without instructions for SHA-256 spends its time on one stream waiting for the result before: eight
 * or sixteen streams side by side cost little more than one. Plain C for ctypes: no Python headers are needed, and
 * ctypes lets other threads run meanwhile.
 */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define BLOCK 64
#define MOST_LANES 16
#define EXPORTED __attribute__((visibility("default")))

/* What is known of a stream; builder/sha256.py has the same structure. */
struct stream {
    uint32_t state[8];
    uint64_t size; /* bytes taken in, those of `block` among them */
    uint64_t held; /* bytes in `block`, fewer than BLOCK between calls */
    uint8_t block[BLOCK];
};

/* Raise it with every change of what builder/sha256.py calls, and there too. */
EXPORTED int torchyard_sha256_abi(void)
{
    return 1;
}

#if defined(__x86_64__)

#include <cpuid.h>
#include <immintrin.h>

/* First 32 bits of the fractional parts of the cube roots of the first 64 primes (FIPS 180-4, 4.2.2). */
static const uint32_t ROUND[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

/* Bytes of each 32-bit word in the other order, in one 128-bit lane. */
#define SWAPPED 3, 2, 1, 0, 7, 6, 5, 4, 11, 10, 9, 8, 15, 14, 13, 12

/* words[i] = word i of the next block of each of 8 streams: two transpositions of 8 by 8. */
#define TRANSPOSED_8(NAME, SET)                                                                          \
    __attribute__((target(SET), always_inline)) static inline void NAME(__m256i *words, const uint8_t **data) \
    {                                                                                                    \
        const __m256i swapped = _mm256_setr_epi8(SWAPPED, SWAPPED);                                      \
        for (int half = 0; half < 2; half++, words += 8) {                                               \
            __m256i r[8], s[8];                                                                          \
            for (int i = 0; i < 8; i++)                                                                  \
                r[i] = _mm256_shuffle_epi8(_mm256_loadu_si256((const __m256i *)(data[i] + 32 * half)), swapped); \
            for (int i = 0; i < 8; i += 2) {                                                             \
                s[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);                                            \
                s[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);                                        \
            }                                                                                            \
            for (int i = 0; i < 8; i += 4) {                                                             \
                r[i] = _mm256_unpacklo_epi64(s[i], s[i + 2]);                                            \
                r[i + 1] = _mm256_unpackhi_epi64(s[i], s[i + 2]);                                        \
                r[i + 2] = _mm256_unpacklo_epi64(s[i + 1], s[i + 3]);                                    \
                r[i + 3] = _mm256_unpackhi_epi64(s[i + 1], s[i + 3]);                                    \
            }                                                                                            \
            for (int i = 0; i < 4; i++) {                                                                \
                words[i] = _mm256_permute2x128_si256(r[i], r[i + 4], 0x20);                              \
                words[i + 4] = _mm256_permute2x128_si256(r[i], r[i + 4], 0x31);                          \
            }                                                                                            \
        }                                                                                                \
    }

TRANSPOSED_8(transposed_8_avx2, "avx2")
TRANSPOSED_8(transposed_8_avx512, "avx512f,avx512bw,avx512vl")

/* The same of 16 streams: one transposition of 16 by 16. */
__attribute__((target("avx512f,avx512bw,avx512vl"), always_inline)) static inline void
transposed_16(__m512i *words, const uint8_t **data)
{
    const __m512i swapped = _mm512_broadcast_i32x4(_mm_setr_epi8(SWAPPED));
    __m512i r[16], s[16];
    for (int i = 0; i < 16; i++)
        r[i] = _mm512_shuffle_epi8(_mm512_loadu_si512(data[i]), swapped);
    for (int i = 0; i < 16; i += 2) {
        s[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        s[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(s[i], s[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(s[i], s[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(s[i + 1], s[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(s[i + 1], s[i + 3]);
    }
    /* r[4 * i + k] now has, in its 128-bit lane q, word 4 * q + k of the streams 4 * i to 4 * i + 3. */
    for (int k = 0; k < 4; k++) {
        __m512i low_even = _mm512_shuffle_i32x4(r[k], r[4 + k], 0x88);
        __m512i high_even = _mm512_shuffle_i32x4(r[8 + k], r[12 + k], 0x88);
        __m512i low_odd = _mm512_shuffle_i32x4(r[k], r[4 + k], 0xdd);
        __m512i high_odd = _mm512_shuffle_i32x4(r[8 + k], r[12 + k], 0xdd);
        words[k] = _mm512_shuffle_i32x4(low_even, high_even, 0x88);
        words[4 + k] = _mm512_shuffle_i32x4(low_odd, high_odd, 0x88);
        words[8 + k] = _mm512_shuffle_i32x4(low_even, high_even, 0xdd);
        words[12 + k] = _mm512_shuffle_i32x4(low_odd, high_odd, 0xdd);
    }
}

#define KERNEL eight_avx2
#define TARGET "avx2"
#define LANES 8
#define VECTOR __m256i
#define LOAD(p) _mm256_loadu_si256((const __m256i *)(p))
#define STORE(p, v) _mm256_storeu_si256((__m256i *)(p), v)
#define TRANSPOSED transposed_8_avx2
#define ROTATED(x, n) _mm256_or_si256(_mm256_srli_epi32(x, n), _mm256_slli_epi32(x, 32 - (n)))
#define SHIFTED(x, n) _mm256_srli_epi32(x, n)
#define XOR3(x, y, z) _mm256_xor_si256(_mm256_xor_si256(x, y), z)
#define CHOICE(x, y, z) _mm256_xor_si256(z, _mm256_and_si256(x, _mm256_xor_si256(y, z)))
#define MAJORITY(x, y, z) _mm256_or_si256(_mm256_and_si256(x, y), _mm256_and_si256(z, _mm256_or_si256(x, y)))
#define ADD(x, y) _mm256_add_epi32(x, y)
#define ALL(x) _mm256_set1_epi32((int)(x))
#include "sha256_kernel.h"

/* AVX-512 rotates in one instruction, and has one for every function of three bits: its truth table is the last
 * operand. */
#define KERNEL eight_avx512
#define TARGET "avx512f,avx512bw,avx512vl"
#define LANES 8
#define VECTOR __m256i
#define LOAD(p) _mm256_loadu_si256((const __m256i *)(p))
#define STORE(p, v) _mm256_storeu_si256((__m256i *)(p), v)
#define TRANSPOSED transposed_8_avx512
#define ROTATED(x, n) _mm256_ror_epi32(x, n)
#define SHIFTED(x, n) _mm256_srli_epi32(x, n)
#define XOR3(x, y, z) _mm256_ternarylogic_epi32(x, y, z, 0x96)
#define CHOICE(x, y, z) _mm256_ternarylogic_epi32(x, y, z, 0xca)
#define MAJORITY(x, y, z) _mm256_ternarylogic_epi32(x, y, z, 0xe8)
#define ADD(x, y) _mm256_add_epi32(x, y)
#define ALL(x) _mm256_set1_epi32((int)(x))
#include "sha256_kernel.h"

#define KERNEL sixteen_avx512
#define TARGET "avx512f,avx512bw,avx512vl"
#define LANES 16
#define VECTOR __m512i
#define LOAD(p) _mm512_loadu_si512(p)
#define STORE(p, v) _mm512_storeu_si512(p, v)
#define TRANSPOSED transposed_16
#define ROTATED(x, n) _mm512_ror_epi32(x, n)
#define SHIFTED(x, n) _mm512_srli_epi32(x, n)
#define XOR3(x, y, z) _mm512_ternarylogic_epi32(x, y, z, 0x96)
#define CHOICE(x, y, z) _mm512_ternarylogic_epi32(x, y, z, 0xca)
#define MAJORITY(x, y, z) _mm512_ternarylogic_epi32(x, y, z, 0xe8)
#define ADD(x, y) _mm512_add_epi32(x, y)
#define ALL(x) _mm512_set1_epi32((int)(x))
#include "sha256_kernel.h"

/* The instruction sets there are kernels for; builder/sha256.py has the same numbers. */
enum { NONE = 0, AVX2 = 1, AVX512 = 2 };

EXPORTED int torchyard_sha256_best(void)
{
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
        return AVX512;
    return __builtin_cpu_supports("avx2") ? AVX2 : NONE;
}

/* Whether the processor has instructions for SHA-256 itself, which libraries use for single streams. */
EXPORTED int torchyard_sha256_has_own(void)
{
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && b >> 29 & 1;
}

/* A lane: the stream in it, NULL if it stands empty, and what is left of its pieces. */
struct lane {
    struct stream *stream;
    size_t piece, end; /* pieces that are left: this one, and those below `end` */
    size_t at;         /* bytes taken of the piece */
    size_t blocks;     /* whole blocks that can be hashed where they lie */
    int from_held;     /* they are one, and it is the stream's own */
};

/* Find the next whole blocks of a lane, and return where they lie; NULL at the end, with the rest held. */
static const uint8_t *next(struct lane *lane, const uint8_t *const *data, const size_t *sizes)
{
    struct stream *stream = lane->stream;
    for (; lane->piece < lane->end; lane->piece++, lane->at = 0) {
        const uint8_t *from = data[lane->piece] + lane->at;
        size_t left = sizes[lane->piece] - lane->at;
        if (!stream->held && left >= BLOCK) {
            lane->blocks = left / BLOCK;
            lane->from_held = 0;
            lane->at += lane->blocks * BLOCK;
            stream->size += lane->blocks * BLOCK;
            return from;
        }
        size_t taken = BLOCK - stream->held < left ? BLOCK - stream->held : left;
        memcpy(stream->block + stream->held, from, taken);
        stream->held += taken;
        stream->size += taken;
        lane->at += taken;
        if (stream->held == BLOCK) {
            lane->blocks = 1;
            lane->from_held = 1;
            return stream->block;
        }
    }
    return NULL;
}

/* Hash the pieces of `count` streams; those of stream i are first[i] to first[i + 1] - 1.
 *
 * Of the first of them skip[i] bytes have been taken before. It ends when fewer than `least` streams are left that have
 * something to hash, for lanes that stand empty cost as much as full ones; consumed[i] is how many bytes of stream i
 * were taken. `kind` is one that the processor has.
 */
EXPORTED void torchyard_sha256_update(int kind, struct stream **streams, size_t count, const uint8_t *const *data,
                                      const size_t *sizes, const size_t *first, const size_t *skip,
                                      size_t least, uint64_t *consumed)
{
    static const uint8_t nothing[BLOCK];
    const size_t lanes = kind == AVX512 && count > 8 ? 16 : 8;
    void (*const kernel)(uint32_t *, const uint8_t **, const size_t *, size_t) =
        kind == AVX2 ? eight_avx2 : lanes == 16 ? sixteen_avx512 : eight_avx512;
    struct lane lane[MOST_LANES];
    uint32_t state[8 * MOST_LANES] = {0};
    const uint8_t *at[MOST_LANES];
    size_t step[MOST_LANES], waiting = 0, active = 0;
    memset(lane, 0, sizeof lane);
    for (size_t i = 0; i < count; i++)
        consumed[i] = streams[i]->size;
    for (;;) {
        size_t blocks = SIZE_MAX;
        for (size_t i = 0; i < lanes; i++) {
            while (!lane[i].blocks) {
                if (lane[i].stream) {
                    if (lane[i].from_held)
                        lane[i].stream->held = 0;
                    if ((at[i] = next(&lane[i], data, sizes))) {
                        step[i] = BLOCK;
                        break;
                    }
                    for (size_t word = 0; word < 8; word++)
                        lane[i].stream->state[word] = state[word * lanes + i];
                    active--;
                }
                lane[i] = (struct lane){0};
                if (waiting == count) {
                    at[i] = nothing;
                    step[i] = 0;
                    break;
                }
                lane[i].stream = streams[waiting];
                lane[i].piece = first[waiting];
                lane[i].end = first[waiting + 1];
                lane[i].at = skip[waiting];
                for (size_t word = 0; word < 8; word++)
                    state[word * lanes + i] = lane[i].stream->state[word];
                waiting++;
                active++;
            }
            if (lane[i].stream && lane[i].blocks < blocks)
                blocks = lane[i].blocks;
        }
        if (!active || (active < least && waiting == count))
            break;
        kernel(state, at, step, blocks);
        for (size_t i = 0; i < lanes; i++)
            if (lane[i].stream)
                lane[i].blocks -= blocks;
    }
    for (size_t i = 0; i < lanes; i++) {
        struct stream *stream = lane[i].stream;
        if (!stream)
            continue;
        for (size_t word = 0; word < 8; word++)
            stream->state[word] = state[word * lanes + i];
        /* Blocks that were found and not hashed are given back; one of the stream's own stays until the next call. */
        if (!lane[i].from_held)
            stream->size -= lane[i].blocks * BLOCK;
    }
    for (size_t i = 0; i < count; i++)
        consumed[i] = streams[i]->size - consumed[i];
}

#endif
