"""Run folders that resume, and Hugging Face folders in and out."""
