"""Kernels in Triton. Each has a twin in plain operators (`kernels.torch`), and is proven against it without a GPU."""
