"""Studies: many runs whose differences are listed in a table.

Also runs that train mixers alone on a frozen basis.
"""
