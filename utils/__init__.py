"""The trainer's organs: each file one noun, testable alone. Nothing here knows models/ or configs.py."""
