"""The life of one run, on disk and on screen."""
