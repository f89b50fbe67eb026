"""What lies on disk: model folders, adapter folders, and how a folder is replaced whole."""
