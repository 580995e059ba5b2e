"""Runs inside images: finds out what an environment is and whether it works. Standard library and torch only."""
