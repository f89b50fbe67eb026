"""Co-serving beside its ablations and its peers, on one trace: `python -m coserve`."""
