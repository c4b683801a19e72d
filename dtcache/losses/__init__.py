"""What a student minimises."""
