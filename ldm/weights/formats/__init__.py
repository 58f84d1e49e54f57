"""The formats of files and folders: safetensors, pickles, single files, diffusers and ldm layout, the hub."""
