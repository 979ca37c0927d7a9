"""What measures, plans and compares speed."""
