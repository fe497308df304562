"""Every published file format, in and out."""
