/* One block of LANES streams at a time: the rounds of FIPS 180-4, section 6.2.2, on vectors with one stream a lane.
 *
 * Included once for each instruction set, which defines KERNEL, TARGET, LANES, VECTOR and the operations used here.
 */

__attribute__((target(TARGET))) static void KERNEL(uint32_t *state, const uint8_t **data, const size_t *step,
                                                   size_t blocks)
{
    VECTOR sum[8];
    for (int word = 0; word < 8; word++)
        sum[word] = LOAD(state + word * LANES);
    while (blocks--) {
        VECTOR w[16];
        TRANSPOSED(w, data);
        for (int lane = 0; lane < LANES; lane++)
            data[lane] += step[lane];
        VECTOR a = sum[0], b = sum[1], c = sum[2], d = sum[3], e = sum[4], f = sum[5], g = sum[6], h = sum[7];
        _Pragma("GCC unroll 64")
        for (int t = 0; t < 64; t++) {
            if (t >= 16) {
                VECTOR late = w[(t - 2) & 15], early = w[(t - 15) & 15];
                w[t & 15] = ADD(ADD(w[t & 15], w[(t - 7) & 15]),
                                ADD(XOR3(ROTATED(early, 7), ROTATED(early, 18), SHIFTED(early, 3)),
                                    XOR3(ROTATED(late, 17), ROTATED(late, 19), SHIFTED(late, 10))));
            }
            VECTOR one = ADD(ADD(ADD(h, w[t & 15]), ALL(ROUND[t])),
                             ADD(XOR3(ROTATED(e, 6), ROTATED(e, 11), ROTATED(e, 25)), CHOICE(e, f, g)));
            VECTOR two = ADD(XOR3(ROTATED(a, 2), ROTATED(a, 13), ROTATED(a, 22)), MAJORITY(a, b, c));
            h = g, g = f, f = e, e = ADD(d, one), d = c, c = b, b = a, a = ADD(one, two);
        }
        sum[0] = ADD(sum[0], a), sum[1] = ADD(sum[1], b), sum[2] = ADD(sum[2], c), sum[3] = ADD(sum[3], d);
        sum[4] = ADD(sum[4], e), sum[5] = ADD(sum[5], f), sum[6] = ADD(sum[6], g), sum[7] = ADD(sum[7], h);
    }
    for (int word = 0; word < 8; word++)
        STORE(state + word * LANES, sum[word]);
}

#undef KERNEL
#undef TARGET
#undef LANES
#undef VECTOR
#undef LOAD
#undef STORE
#undef TRANSPOSED
#undef ROTATED
#undef SHIFTED
#undef XOR3
#undef CHOICE
#undef MAJORITY
#undef ADD
#undef ALL
