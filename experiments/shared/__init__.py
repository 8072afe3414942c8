"""What several experiments need alike. No experiment itself: those are the files one level up."""
