"""Sources of photos: folders, lists, archives, addresses, with the identities and metadata that they give."""
