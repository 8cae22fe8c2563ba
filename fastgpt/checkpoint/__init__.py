"""Checkpoints: atomic, hashed, independent of the layout that wrote them."""
