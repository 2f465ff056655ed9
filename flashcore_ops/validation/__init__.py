"""What `flashcore validate` does: a model on FlashCore held against the same model on Hugging Face's attention."""
