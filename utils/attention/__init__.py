"""What a model attends to, and how people edit it."""
