"""Bulk runs over many photos: ingest, embed and calibrate, with their reports."""
