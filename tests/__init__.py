"""A regular package, so that no other installed one of this name is found in its place."""
