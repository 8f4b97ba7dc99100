"""A job is a row: created, claimed, ended, in the caller's transaction."""
