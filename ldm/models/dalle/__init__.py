"""DALL·E Mini: text encoder, decoder of image tokens, detokenizer; DALL·E's discrete autoencoder."""
