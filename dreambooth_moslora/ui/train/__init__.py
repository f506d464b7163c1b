"""Train screen of the page: its form, photos and masks, the start of a run and its progress."""
