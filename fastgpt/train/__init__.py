"""The training loop, its schedule, optimizer and watchers."""
