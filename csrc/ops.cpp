// Defines the library `coterie`; the other sources give its ops their kernels.
#include <torch/csrc/stable/library.h>

#include "schemas.h"

STABLE_TORCH_LIBRARY(coterie, m) { coterie::define_ops(m); }
