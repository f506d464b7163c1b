"""The Train tab: its form, photos, masks, cost and queue, and the runs that it shows."""
