"""The adapters that a visitor can choose or upload: by name, checked by their header, described in a few words."""
