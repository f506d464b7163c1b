"""Settings from the files and flags of other trainers, by one table for each trainer."""
