"""How a toy and its place are drawn: shapes, paints, and rays."""
