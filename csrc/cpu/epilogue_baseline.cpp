// The epilogue for any processor of the architecture.
#include "epilogue.h"

#define SRPKD_TARGET baseline
#define SRPKD_VECTOR_BYTES 16
#include "epilogue_body.h"
