"""Files that other programs read: each format is a module that nothing imports until it is asked
for.
"""
