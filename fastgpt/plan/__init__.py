"""What a run will need and how fast it will go, by arithmetic alone: no GPU, no PyTorch. See docs/planning.md."""
