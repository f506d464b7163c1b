"""What the steps learn from: photos, captions, masks and class images, encoded once."""
