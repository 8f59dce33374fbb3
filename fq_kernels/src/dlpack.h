/* What is read of DLPack's structures, version 1 and the one before: dmlc.github.io/dlpack/latest/c_api.html */
#ifndef FQ_DLPACK_H
#define FQ_DLPACK_H

#include <stdint.h>

enum { FQ_DL_CPU = 1, FQ_DL_UINT = 1, FQ_DL_FLOAT = 2, FQ_DL_BFLOAT = 4, FQ_DL_READ_ONLY = 1, FQ_DL_IS_COPIED = 2 };
enum { FQ_DL_MAX_DIMS = 64 };

typedef struct {
    void *data;
    int32_t device_type, device_id;
    int32_t ndim;
    uint8_t code, bits;
    uint16_t lanes;
    int64_t *shape, *strides; /* in elements; strides may be NULL: C order */
    uint64_t byte_offset;
} fq_dl_tensor;

typedef struct fq_dl_managed {
    fq_dl_tensor tensor;
    void *context;
    void (*deleter)(struct fq_dl_managed *);
} fq_dl_managed;

typedef struct fq_dl_versioned {
    uint32_t major, minor;
    void *context;
    void (*deleter)(struct fq_dl_versioned *);
    uint64_t flags;
    fq_dl_tensor tensor;
} fq_dl_versioned;

#endif
