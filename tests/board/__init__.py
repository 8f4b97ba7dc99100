"""The board: bugs that are planted into a copy of the package, one at a time, to see which tests notice.

``python -m tests.board`` does it; ``bugs.py`` is the list.
"""
