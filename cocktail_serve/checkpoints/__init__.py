"""Model folders: read, compared, fingerprinted, mixed one tensor at a time, written."""
