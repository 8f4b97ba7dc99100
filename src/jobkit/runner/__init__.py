"""The loops and threads that run jobs: claim, render, store, finish."""
