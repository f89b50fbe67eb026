"""How values get to a device and back: the host waits for it nowhere else."""
