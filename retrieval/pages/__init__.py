"""HTML pages: one layout, one stylesheet, one way to put text and photos into them."""
