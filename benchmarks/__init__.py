"""How fast the project is beside its peers and beside the machine's limit: one file a question. See README.md."""
