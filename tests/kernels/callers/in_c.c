/* An extension in C that calls the kernels by their table. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <fq_kernels.h>

/* everything(x, residual, weight, out, total, rows, n, format): by address; the norm of the sum, its round trip to the
 * format in place, and bf16 there and back of total, without the GIL. */
static PyObject *everything(PyObject *self, PyObject *args) {
    (void)self;
    Py_ssize_t x, residual, weight, out, total, rows, n;
    const char *name;
    if (!PyArg_ParseTuple(args, "nnnnnnns", &x, &residual, &weight, &out, &total, &rows, &n, &name)) {
        return NULL;
    }
    const fq_kernels_api *fq = fq_kernels_import();
    if (!fq) {
        return NULL;
    }
    const fq_kernels_format *format = fq->format(name, n);
    if (!format) {
        return NULL;
    }
    uint16_t *bits = PyMem_Malloc((size_t)(rows * n) * sizeof *bits);
    if (!bits) {
        return PyErr_NoMemory();
    }
    Py_BEGIN_ALLOW_THREADS
    fq->add_rms_norm_f32((float *)x, n, (float *)residual, n, (float *)weight, 1e-5, NULL, 0, 0, (float *)out, n,
                         (float *)total, n, rows, n);
    fq->round_trip((float *)out, n, format, 7, (float *)out, n, rows, n);
    fq->float_to_bf16((float *)total, bits, rows * n);
    fq->bf16_to_float(bits, (float *)total, rows * n);
    Py_END_ALLOW_THREADS
    PyMem_Free(bits);
    return PyUnicode_FromString(fq->isa());
}

static PyMethodDef methods[] = {{"everything", everything, METH_VARARGS, NULL}, {NULL, NULL, 0, NULL}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "in_c", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit_in_c(void) { return PyModule_Create(&module); }
