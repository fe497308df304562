"""What a model attends to, and people's edits of it."""
