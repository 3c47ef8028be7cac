"""WebDataset shards -> prompts, encoded by one processor call."""
