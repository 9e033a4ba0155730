"""The HTTP face: OpenAI's routes and ours, thin over `cocktails` and `engines`. The only place that imports FastAPI."""
