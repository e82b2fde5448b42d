"""Making data sets, from images as people have them."""
