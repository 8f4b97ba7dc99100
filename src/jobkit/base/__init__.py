"""Time, ids, text, threads, event loops: helpers that know nothing of jobs."""
