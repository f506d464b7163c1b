"""Small nets that read a picture: what it shows, which pixels are the toy, where it stands."""
