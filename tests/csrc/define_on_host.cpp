// Defines all ops in a library of the tests' own, for kernels that run on the host.
#include <torch/csrc/stable/library.h>

#include "schemas.h"

#define DEFINE_LIBRARY(name, m) STABLE_TORCH_LIBRARY(name, m)

DEFINE_LIBRARY(COTERIE_LIBRARY, m) { coterie::define_ops(m); }
