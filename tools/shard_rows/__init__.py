"""Rows of a data set -> WebDataset shards: what `make_shards.py rows` does."""
