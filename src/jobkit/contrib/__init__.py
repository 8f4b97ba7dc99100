"""What is built on jobkit and ships with it, each part behind an extra of its own."""
