"""Commands against a running server, over its HTTP API as any client has it."""
