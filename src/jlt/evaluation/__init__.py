"""Features -> statistics -> numbers."""
