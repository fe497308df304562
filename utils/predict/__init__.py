"""Labels for images: which images, in what order; the processes that compute; the rows that are written."""
