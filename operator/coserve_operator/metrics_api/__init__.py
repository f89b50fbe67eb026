"""custom.metrics.k8s.io: a server of its own beside the operator."""
