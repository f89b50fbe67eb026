"""The model's forward over a mixed batch, the backward of its passes, and their measuring at start-up."""
