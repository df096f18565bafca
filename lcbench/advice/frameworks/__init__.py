"""What a choice is in other frameworks: one file per framework, found by its file."""
