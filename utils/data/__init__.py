"""Loads data: from files to batches on the device."""
