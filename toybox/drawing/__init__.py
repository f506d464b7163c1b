"""Draw a toy and its place: shapes, paints, and rays."""
