"""The contest and the loop over cases, for every subcommand that measures."""
