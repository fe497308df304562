"""Reads and writes every published file format of these models."""
