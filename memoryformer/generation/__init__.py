"""Text that continues text."""
