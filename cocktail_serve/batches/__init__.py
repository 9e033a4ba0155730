"""OpenAI's batches: files of requests that are answered when the engines have time for them."""
