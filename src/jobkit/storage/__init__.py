"""Bytes under keys, in a folder or any fsspec filesystem; it knows no rows."""
