"""The words of `Kernels` by plain aten operators, for any device, in float32 or bfloat16: the definition that every
kernel of ours is measured against.
"""
