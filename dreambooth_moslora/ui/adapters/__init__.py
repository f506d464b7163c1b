"""The adapters that a user can choose or upload: listed by name, checked by their header, summarised."""
