"""The update and the loop."""
