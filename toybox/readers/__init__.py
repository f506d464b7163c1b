"""Small nets that read a picture: what it shows, which pixels are the toy, and where it stands."""
