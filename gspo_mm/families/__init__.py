"""Model families: Hugging Face folder -> megatron configuration, weight map, vision tower."""
