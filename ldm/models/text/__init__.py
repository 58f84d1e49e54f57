"""Text encoders other than CLIP's, and the tokenizers of all text encoders."""
