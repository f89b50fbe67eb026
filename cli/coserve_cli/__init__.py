"""`coserve`: one machine, no Kubernetes. Serve a model, finetune it, look at data, measure a server."""
