"""The kernels of a CPU, by torch's operators; the plain products serve any device."""
