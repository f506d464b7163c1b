"""The Train tab: its form, masks, cost and queue, and the view of its runs."""
