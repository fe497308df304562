"""Measure how fast the project is, compared with other packages and the machine's limit: one file per question (README.md)."""
