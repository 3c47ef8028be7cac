"""The trained model: transformers' vision tower and megatron-core's decoder, its optimizer and its passes."""
