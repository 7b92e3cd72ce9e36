"""Readers of the distributed files: a file for each format, and what they share."""
