"""From photos to vectors, without a gallery: the pipeline stages that bulk runs share."""
