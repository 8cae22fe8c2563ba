"""What a language model can do without being trained for it."""
