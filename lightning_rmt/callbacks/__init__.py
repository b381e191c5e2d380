"""The Trainer's hooks, and nothing else: one file, one class."""
