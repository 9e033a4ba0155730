"""The one database: its tables, how it is opened and brought up to date. Knows nothing of what the rows mean."""
