"""The adapted projections computed in fewer operations, for one adapter and for several at once."""
