"""OpenAI's fine-tuning in terms of cocktails: files of examples, and jobs that are cocktails in other words."""
