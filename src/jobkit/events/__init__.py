"""What was committed becomes signals, and streams."""
