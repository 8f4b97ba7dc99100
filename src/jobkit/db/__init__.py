"""The host's engines and connections, and what SQLite and PostgreSQL say differently."""
