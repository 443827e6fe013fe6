"""Datasets in memory and images in files: getting, reading and splitting them.

May import runs.
"""
