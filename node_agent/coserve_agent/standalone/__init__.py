"""Finetuning without Redis and Kubernetes: what the operator does for a cluster, for one server and its directory."""
