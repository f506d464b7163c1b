"""The Generate tab: its form, its widgets, and the actions of its buttons."""
