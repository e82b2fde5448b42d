"""What attention does over time, and which frequencies settle when."""
