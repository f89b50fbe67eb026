"""The objects that an endpoint and a job own, as manifests."""
