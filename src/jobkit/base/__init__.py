"""Time, ids, text, threads: what knows nothing of jobs."""
