"""Results, tables and progress."""
