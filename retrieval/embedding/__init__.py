"""From photos to vectors, without a gallery: the stages that bulk runs share."""
