"""Builders of the Kubernetes objects that endpoints and jobs own: pure functions from specs to manifests."""
