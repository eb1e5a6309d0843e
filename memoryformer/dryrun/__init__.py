"""What a run would need, without running it. Start at `examine.examine`."""
