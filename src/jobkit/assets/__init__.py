"""A file of a company: an object in a storage, and its row."""
