"""The HTTP service of a gallery: needs the packages of the extra `service`."""
