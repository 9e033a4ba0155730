/* Reads all bytes and does next to nothing with them: what mixing is measured against. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef uint64_t u64x8 __attribute__((vector_size(64)));

uint64_t scan(const char *bytes, size_t size) {
    u64x8 a = {0}, b = {0}, c = {0}, d = {0}, read[4];
    for (size_t i = 0; i + sizeof read <= size; i += sizeof read) {
        memcpy(read, bytes + i, sizeof read);
        a ^= read[0], b ^= read[1], c ^= read[2], d ^= read[3];
    }
    a ^= b ^ c ^ d;
    return a[0] ^ a[1] ^ a[2] ^ a[3] ^ a[4] ^ a[5] ^ a[6] ^ a[7];
}
