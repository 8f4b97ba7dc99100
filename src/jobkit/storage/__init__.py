"""Bytes under keys, in a folder or any fsspec filesystem. Knows no rows."""
