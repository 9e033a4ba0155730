"""A pool without a server: its models mixed in memory, weighed and asked."""
