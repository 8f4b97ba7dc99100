"""The processes of a chaos run: workers, a creator of jobs, a janitor, subscribers, and the zygote that forks them."""
