"""Whose turn it is on an engine that holds one recipe at a time."""
