"""Labels for images: the sources of the images, the processes that predict, and the rows that are written."""
