"""Renderers that ship with jobkit, one module each. Importing one needs no extra; registering it does."""
