"""The words of `Kernels` without arithmetic: shapes, and how many launches they would be."""
