"""Runs over many photos: enroll, embed, calibrate."""
