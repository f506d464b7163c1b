"""The Generate tab: its form, its widgets, and what its buttons do."""
