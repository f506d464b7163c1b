"""The Train tab: its form, masks, cost and queue, and the runs that it shows."""
