"""Who does the matrix work."""
