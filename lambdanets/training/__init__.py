"""The loop that any task is trained by."""
