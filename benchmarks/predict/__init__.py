"""What each design must cost, without a GPU."""
