"""The exchange inside one NVLink domain, in fused kernels (Comet, arXiv 2502.19811)."""
