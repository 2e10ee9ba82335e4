"""The routes of the service: one module for each kind of thing that they are about."""
