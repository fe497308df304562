"""One optimizer step and its parts."""
