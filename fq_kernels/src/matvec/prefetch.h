/* Packed weights are fetched from memory before they are read, from several pages at once: what a processor fetches by
 * itself ends with a page, and so does what it knows of addresses. While a block of as many pages is read, the next block
 * is fetched, each of its pages from beginning to end. A prefetch past the end of the weights, or of the mapping,
 * does nothing. */
#ifndef FQ_MATVEC_PREFETCH_H
#define FQ_MATVEC_PREFETCH_H

#define FQ_PAGE 4096
#define FQ_PAGES 4

/* For `bytes` that are read at p; of rows read side by side, where they would be read one after the other. */
FQ_INLINE void fq_prefetch(const uint8_t *p, int bytes) {
    const uintptr_t read = (uintptr_t)p % (FQ_PAGES * FQ_PAGE);
    const uint8_t *next = p + (FQ_PAGES * FQ_PAGE - read + read / FQ_PAGES);
    FQ_UNROLL
    for (int page = 0; page < FQ_PAGES; page++) {
        FQ_UNROLL
        for (int i = 0; i < bytes; i += 64 * FQ_PAGES) {
            _mm_prefetch(next + page * FQ_PAGE + i / FQ_PAGES, _MM_HINT_T0);
        }
    }
}

#endif
