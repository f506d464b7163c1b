"""The training inputs: photos, captions, masks and class images, each encoded once."""
