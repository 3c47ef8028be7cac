"""What a Hugging Face folder holds and means: weight files, processor, end of an answer. Imports no torch by itself."""
