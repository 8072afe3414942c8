"""What a step will need before it runs: memory, arithmetic and time, from shapes alone."""
