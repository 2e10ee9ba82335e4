"""The page of the service: HTML for people, beside `/v1` for programs; one module for each part of it."""
